"""`Session`: one loaded component, numpy in and out, from open to close. With what backends share, and their table."""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import bind_axes
from runtimes.errors import BundleError, DeployError
from runtimes.system.device import CPU, Device

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
        device: where the component runs; each backend refuses the kinds that it does not know.
        threads: CPU threads inside one operator; 0 lets the backend use all cores.
        hint: of OpenVINO: "latency" gives one call every core, "throughput" runs several calls at once.
        pin_threads: keep each CPU thread on a core of its own.
        lora: of a bundle built with `--lora-mode swap`: `FILE[:SCALE]` each instead of its own, or "none".
        keep_graphs: of ONNX Runtime on the CPU: keep large graphs as it optimized them, for the next load.
    """

    device: Device = CPU
    threads: int = 0
    hint: str = "latency"
    pin_threads: bool = False
    lora: tuple[str, ...] = ()
    keep_graphs: bool = False


class Session(ABC):
    """One loaded component, from `open` to `close`; `with` closes it at its end.

    Thread-safe: between calls it keeps the signature that it checked last, and how many calls are running.

    Attributes:
        name: of the component.
        component: its record in the manifest: names, dtypes and shapes of inputs and outputs.
    """

    def __init__(self, name: str, component: Component) -> None:
        self.name, self.component = name, component
        self._checked: tuple[Any, ...] = ()
        self._life = threading.Condition()
        self._running, self._closed = 0, False

    @staticmethod
    def open(bundle: Bundle, name: str, options: SessionOptions) -> Session:
        """Load one component with the backend of its format, adapters aside: `open_session` adds those.

        Raises:
            BundleError: no runtime runs its format, or its files are damaged.
            InputError: an option that the backend does not take.
            UnavailableError: the runtime or the device is missing on this machine.
        """
        component = bundle.component(name)
        if component.format not in FORMATS:
            raise BundleError(f"no runtime runs the format {component.format!r}", where=f"{bundle.path}: {name}",
                              fix=f"build for one of {', '.join(sorted(FORMATS))}")
        module, _, attribute = FORMATS[component.format].partition(":")
        session: Session = getattr(importlib.import_module(module), attribute)(bundle, name, options)
        return session

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run the component.

        Args:
            feeds: every input of the component by name, with the dtype and shape its TensorSpec says.

        Returns:
            every output by name, with the dtype and shape its TensorSpec says; fresh arrays that the caller owns.

        Raises:
            InputError: a name, dtype or shape does not fit.
            OutOfMemoryError: fewer rows or a smaller size may fit.
            DeployError: the session is closed, which is a fault of the program and not of its user; or the backend
                failed.
        """
        with self._life:
            if self._closed:
                raise DeployError("the session is closed", where=self.name, fix="open another one")
            self._running += 1
        try:
            # A denoising loop feeds the same shapes at every step, and bind_axes looks at nothing else.
            signature = tuple([(name, array.dtype, array.shape) for name, array in feeds.items()])
            if signature != self._checked:
                bind_axes(self.component.inputs, feeds, self.component.axes, self.name)
                self._checked = signature
            return self._run(feeds)
        finally:
            with self._life:
                self._running -= 1
                self._life.notify_all()

    def close(self) -> None:
        """Wait for the calls that are running, refuse later ones, and give back what the backend holds.

        Closing again does nothing. A session that nobody refers to any more gives back everything too.
        """
        with self._life:
            if self._closed:
                return
            self._closed = True
            self._life.wait_for(lambda: not self._running)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run checked feeds; arguments and results as for `run`."""

    def _close(self) -> None:  # noqa: B027 - a session without weights holds nothing
        """Give back what is held; called once, while no call is running."""


class WrappedSession(Session):
    """A session around another: name, component, calls and life are those of the inner one.

    A subclass overrides `_run` and passes on to `super()._run`. Closing it closes the inner session.

    Args:
        inner: the session below.
        component: what the wrapper takes and returns, where that is not what the inner session does.
    """

    def __init__(self, inner: Session, component: Component | None = None) -> None:
        super().__init__(inner.name, inner.component if component is None else component)
        self.inner = inner

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        return self.inner.run(feeds)

    def _close(self) -> None:
        self.inner.close()
