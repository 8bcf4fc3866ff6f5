"""`Session`: one loaded component, numpy in and out. The table of formats; the checks every backend shares."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import bind_axes
from runtimes.errors import BundleError

Arrays = Mapping[str, np.ndarray[Any, Any]]

# format of a component -> module:class of the session that runs it. A new runtime is one line here and one file.
FORMATS: dict[str, str] = {
    "onnx": "runtimes.backends.onnxruntime_session:OrtSession",
    "openvino": "runtimes.backends.openvino_session:OpenVinoSession",
    "tensorrt": "runtimes.backends.tensorrt.engine_session:TensorRtSession",
}


@dataclass(frozen=True)
class SessionOptions:
    """How a backend should run.

    Attributes:
        device: "cpu", or an accelerator that the format's backend knows ("cuda", "tensorrt", "tensorrt-rtx").
        threads: CPU threads inside one operator; 0 lets the backend use all cores.
        hint: of OpenVINO: "latency" gives one call every core, "throughput" runs several calls at once.
        pin_threads: keep each CPU thread on a core of its own.
        lora: of a bundle built with `--lora-mode swap`: `FILE[:SCALE]` each instead of its own, or "none".
        keep_graphs: of ONNX Runtime on the CPU: keep large graphs as it optimized them, for the next load.
    """

    device: str = "cpu"
    threads: int = 0
    hint: str = "latency"
    pin_threads: bool = False
    lora: tuple[str, ...] = ()
    keep_graphs: bool = False


class Session(ABC):
    """One loaded component. Thread-safe: what it keeps between calls is the signature it checked last."""

    def __init__(self, name: str, component: Component) -> None:
        self.name, self.component = name, component
        self._checked: tuple[Any, ...] = ()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run the component.

        Args:
            feeds: every input of the component by name, with the dtype and shape its TensorSpec says.

        Returns:
            every output by name, fresh arrays that the caller owns.

        Raises:
            InputError: a name, dtype or shape does not fit.
        """
        # A denoising loop feeds the same shapes at every step, and what bind_axes says depends on nothing else.
        signature = tuple([(name, array.dtype, array.shape) for name, array in feeds.items()])
        if signature != self._checked:
            bind_axes(self.component.inputs, feeds, self.component.axes, self.name)
            self._checked = signature
        return self._run(feeds)

    def close(self) -> None:  # noqa: B027 - most backends free everything with their last reference
        """Give back what the backend holds, where it has a way to; the session cannot be run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run checked feeds."""


def open_session(bundle: Bundle, name: str, options: SessionOptions) -> Session:
    """Load one component of a bundle.

    Raises:
        BundleError: no runtime runs its format.
        UnavailableError: the runtime or the device is missing on this machine.
    """
    component = bundle.component(name)
    if component.format not in FORMATS:
        raise BundleError(f"no runtime runs the format {component.format!r}", where=f"{bundle.path}: {name}",
                          fix=f"build for one of {', '.join(sorted(FORMATS))}")
    path = "runtimes.adapters.lora_session:LoraSession" if "lora" in component.details else FORMATS[component.format]
    module, _, attribute = path.partition(":")
    session: Session = getattr(importlib.import_module(module), attribute)(bundle, name, options)
    return session
