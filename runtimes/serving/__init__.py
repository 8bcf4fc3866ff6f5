"""Serve bundles, within a program or over HTTP. Everything is imported when first used; `Engine` needs no extra.

    from runtimes.serving import Engine

    with Engine({"emoji": runtimes.load("build/reference-onnxruntime-fp32")}) as engine:
        ticket = engine.submit(runtimes.Request("a red apple", steps=25, seed=0), "emoji")
        ticket.result().images[0].save("apple.png")                  # or: (await ticket).images
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtimes.serving.engine.contract import Generated
    from runtimes.serving.engine.engine import Engine
    from runtimes.serving.engine.ticket import Progress, Ticket
    from runtimes.serving.engine.waiting import QueueFullError
    from runtimes.serving.options import ServerOptions

__all__ = ["Engine", "Generated", "Progress", "QueueFullError", "ServerOptions", "Ticket"]

_MODULES = {
    "Engine": "engine.engine",
    "Generated": "engine.contract",
    "Progress": "engine.ticket",
    "QueueFullError": "engine.waiting",
    "ServerOptions": "options",
    "Ticket": "engine.ticket",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
