"""The session that runs a component by OpenVINO: a compiled model with a pool of infer requests."""

from __future__ import annotations

import os
import queue
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends.session import Arrays, Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import DTYPES
from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import keep_within_limit, use
from runtimes.system.device import Device

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU", "auto": "AUTO"}
HINTS = {"latency": "LATENCY", "throughput": "THROUGHPUT"}
_OUT_OF_MEMORY = re.compile(r"out of memory|bad[ _]alloc|failed to allocate|cannot allocate", re.IGNORECASE)


class OpenVinoSession(Session):
    """A component on OpenVINO.

    Arrays are handed over without a copy both ways: inputs are wrapped, and the model writes into the arrays that the
    caller receives. Each call takes a request from a pool, so threads never share one; under the latency hint there is
    one request, which uses all cores, and concurrent calls wait for it.
    """

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        """Compile the component, or take it from the cache of compiled models.

        Raises:
            BundleError: the files are corrupt, or OpenVINO does not know an operator.
            InputError: the device is another backend's, or no such hint.
            UnavailableError: the device or its memory is missing.
        """
        component = bundle.component(name)
        super().__init__(name, component)
        device = available_device(options.device)
        from openvino import Tensor

        self._tensor = Tensor
        try:
            # From the file, not from a model read before: only then is the cache found again (0.2 s instead of 1.0).
            wanted = properties(component, options)
            cached = set(os.listdir(wanted["CACHE_DIR"])) if "CACHE_DIR" in wanted else set()
            self._compiled = openvino_core().compile_model(str(bundle.file(component.file)), device, wanted)
            if "CACHE_DIR" in wanted and set(os.listdir(wanted["CACHE_DIR"])) - cached:
                keep_within_limit()
        except RuntimeError as error:
            raise _explained(error, name, running=False) from error
        self._inputs = self._positions(self._compiled.inputs, [s.name for s in component.inputs])
        self._outputs = self._positions(self._compiled.outputs, [s.name for s in component.outputs])
        self._fixed = all(isinstance(d, int) or any(d in s.shape for s in component.inputs)
                          for spec in component.outputs for d in spec.shape)
        count = 1 if options.hint == "latency" else int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._requests.put(self._compiled.create_infer_request())

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        request = self._requests.get()
        try:
            return self._run_on(request, feeds)
        except RuntimeError as error:
            raise _explained(error, self.name, running=True) from error
        finally:
            self._requests.put(request)

    def _run_on(self, request: Any, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        sizes: dict[str, int] = {}
        held = []  # the request points into these until it is done
        for spec, position in zip(self.component.inputs, self._inputs, strict=True):
            array = np.require(feeds[spec.name], requirements=["C", "W"])  # shared memory must be writeable
            held.append(array)
            sizes.update({d: n for d, n in zip(spec.shape, array.shape, strict=True) if isinstance(d, str)})
            request.set_input_tensor(position, self._tensor(array, shared_memory=True))
        results: dict[str, np.ndarray[Any, Any]] = {}
        if self._fixed:
            for spec, position in zip(self.component.outputs, self._outputs, strict=True):
                results[spec.name] = np.empty(spec.resolve(sizes), DTYPES[spec.dtype])
                request.set_output_tensor(position, self._tensor(results[spec.name], shared_memory=True))
        request.start_async()
        request.wait()
        if not self._fixed:
            results = {spec.name: np.array(request.get_output_tensor(position).data)
                       for spec, position in zip(self.component.outputs, self._outputs, strict=True)}
        return results

    def _close(self) -> None:
        del self._requests, self._compiled

    def _positions(self, ports: Any, names: list[str]) -> list[int]:
        """Where each name of the manifest is among the model's ports."""
        found = {n: index for index, port in enumerate(ports) for n in port.get_names()}
        if len(ports) != len(names) or any(n not in found for n in names):
            raise BundleError(f"the model has {sorted(found)}, the manifest {sorted(names)}", where=self.name,
                              fix="build the bundle again")
        return [found[n] for n in names]


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    """One core for the process: it owns the plugins and their thread pools.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    return new_core()


def new_core() -> Any:
    """A core of its own, its CPU plug-in loaded.

    PyTorch and OpenVINO each bring a oneDNN, and both read ONEDNN_MAX_CPU_ISA. OpenVINO's plug-in does not know of the
    limit and chooses kernels that its oneDNN may then not use: 2026.4.1 crashed or answered wrongly with AVX2 on a
    processor that has AVX-512. The limit is therefore hidden while the plug-in reads it, which it does once.

    Raises:
        UnavailableError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError("openvino is not installed", where="format openvino",
                               fix="pip install 'ldm-deploy[openvino]'") from error
    limit = os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
    try:
        core = openvino.Core()
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    finally:
        if limit is not None:
            os.environ["ONEDNN_MAX_CPU_ISA"] = limit
    return core


def available_device(device: Device) -> str:
    """OpenVINO's name of a device: CPU, GPU, GPU.1, NPU, AUTO. `GPU` is its alias for GPU.0.

    Raises:
        InputError: OpenVINO has no such device.
        UnavailableError: this machine has none.
    """
    if device.kind not in DEVICES:
        raise InputError(f"a bundle for OpenVINO does not run on {device.kind!r}", where="device",
                         fix=f"one of {', '.join(DEVICES)}, or build for another --target")
    name, there = DEVICES[device.kind], openvino_core().available_devices
    if device.index:
        name = f"{name}.{device.index}"
    if name != "AUTO" and not any(d == name or d.startswith(f"{name}.") for d in there):
        raise UnavailableError(f"OpenVINO finds no {name} here, only {', '.join(there)}", where="device",
                               fix="install the device's driver, or use --device cpu")
    return name


def properties(component: Component, options: SessionOptions) -> dict[str, Any]:
    """Options of the compilation.

    Raises:
        InputError: no such hint.
    """
    if options.hint not in HINTS:
        raise InputError(f"unknown hint {options.hint!r}", where="hint", fix=f"one of {', '.join(HINTS)}")
    result: dict[str, Any] = {"PERFORMANCE_HINT": HINTS[options.hint]}
    if component.precision != "bf16":
        # A CPU with bfloat16 units would use them unasked, which fp32's budget of 1e-4 does not survive.
        result["INFERENCE_PRECISION_HINT"] = "f32"
    if options.device.kind == "cpu" and options.threads:
        result["INFERENCE_NUM_THREADS"] = options.threads
    if options.device.kind == "cpu" and options.pin_threads:
        result["ENABLE_CPU_PINNING"] = True
    if (folder := cache_folder(component)) is not None:
        result["CACHE_DIR"] = str(folder)
        result["CACHE_MODE"] = "OPTIMIZE_SIZE"  # what was compiled, without a second copy of the weights
    return result


def cache_folder(component: Component) -> Path | None:
    """Where the compiled forms of a component are cached, keyed by OpenVINO itself; None where nothing can be written.

    Components have folders of their own, because OpenVINO does not say which of its files it has read.
    """
    folder = cache_home() / "openvino" / component.sha256[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    use(folder)
    return folder if os.access(folder, os.W_OK) else None


def _explained(error: Exception, name: str, *, running: bool) -> DeployError:
    """OpenVINO's exception, always a RuntimeError, as one of ours by its words; most specific first."""
    lines = [line.strip() for line in str(error).splitlines()
             if line.strip() and not line.startswith(("Exception from", "Check "))]
    line = (lines or [type(error).__name__])[-1][:300]
    if _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(f"out of memory: {line}", where=name, fix="use a smaller batch or size")
    if running:
        return InputError(f"OpenVINO does not run these inputs: {line}", where=name, fix="check shapes and batch")
    return BundleError(f"OpenVINO cannot load it: {line}", where=name, fix="build the bundle again")
