"""Run a bundle: numpy and one backend, no torch. Everything is imported when first used.

    import runtimes

    pipeline = runtimes.load("build/reference-onnxruntime-fp32")
    pipeline("a red apple", steps=25, seed=0)[0].save("apple.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.backends.time_profile import Profile
    from runtimes.bundle.folder import Bundle
    from runtimes.errors import BundleError, CancelledError, DeployError, InputError, ParityError, UnavailableError
    from runtimes.inputs.request import Request
    from runtimes.inputs.request_fields import SizeConditions
    from runtimes.pipeline.diffusion import Pipeline
    from runtimes.pipeline.job import Step
    from runtimes.pipeline.loading import load

__all__ = ["Bundle", "BundleError", "CancelledError", "DeployError", "InputError", "ParityError", "Pipeline", "Profile",
           "Request", "SizeConditions", "Step", "UnavailableError", "load"]

_MODULES = {
    "Bundle": "bundle.folder",
    "Pipeline": "pipeline.diffusion",
    "Profile": "backends.time_profile",
    "Request": "inputs.request",
    "SizeConditions": "inputs.request_fields",
    "Step": "pipeline.job",
    "load": "pipeline.loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
