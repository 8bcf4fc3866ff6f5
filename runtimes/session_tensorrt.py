"""TensorRT and TensorRT for RTX: one engine, one context, buffers allocated once. Decisions: tensorrt_plan."""

from __future__ import annotations

import importlib
import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle
from runtimes.errors import BundleError, DeployError, UnavailableError
from runtimes.places import cache_home
from runtimes.session import Arrays, Session, SessionOptions
from runtimes.tensorrt_device import CudaDevice, Device
from runtimes.tensorrt_plan import (
    GRAPHS_KEPT,
    MODULES,
    PACKAGES,
    check_builder,
    check_gpu,
    check_header,
    check_validity,
    check_version,
    choose_profile,
    known,
    plan_buffers,
    profiles_of,
    runtime_cache_file,
    shape_key,
)
from runtimes.tensors import DTYPES

_Key = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]


class TensorRtSession(Session):
    """A component as a TensorRT engine. It runs on the GPU, whatever device is asked for: it has no other code.

    Calls are serialized: a context has one set of buffers. The second call at the same shapes is recorded as a CUDA
    graph, and later ones replay it; TensorRT for RTX does the same inside, and keeps the kernels that it compiles for
    the user's GPU in a file. Shapes alternate cheaply as long as at most `GRAPHS_KEPT` of them are in use.
    """

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        """Load the engine.

        Raises:
            BundleError: the file is damaged, or the manifest does not describe it.
            UnavailableError: TensorRT, the driver or GPU memory is missing, or it is another GPU's or release's engine.
        """
        component = bundle.component(name)
        super().__init__(name, component)
        file = bundle.file(component.file)
        with file.open("rb") as stream:
            check_header(stream.read(64), file.stat().st_size, name)
        self._profiles = profiles_of(component, name)
        self._buffers = plan_buffers(component, name)
        builder = check_builder(component, name)
        self._trt = load_module(builder, name)
        check_version(component, self._trt.__version__, name)
        self._device = open_device()
        check_gpu(component, self._device.name, self._device.capability, name)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        weights = component.details.get("weights")
        self._engine = self._load(file, bundle.file(weights) if weights else None)
        self._cache_file: Path | None = None
        self._cache: Any = None
        self._context = self._new_context(builder)
        self._base = self._device.allocate(self._buffers.total_bytes)
        self._lock = threading.Lock()
        self._active = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graphs: OrderedDict[_Key, Any] = OrderedDict()
        self._seen: set[_Key] = set()
        self._records = builder == "tensorrt"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        shapes = {spec.name: feeds[spec.name].shape for spec in self.component.inputs}
        profile = choose_profile(self._profiles, shapes, self.name)
        with self._lock:
            self._select(profile, shapes)
            for spec in self.component.inputs:
                self._device.upload(self._address(spec.name), np.ascontiguousarray(feeds[spec.name]))
            self._execute(shape_key(profile, shapes))
            results = {}
            for spec in self.component.outputs:
                shape = tuple(self._context.get_tensor_shape(spec.name))
                results[spec.name] = np.empty(shape, DTYPES[spec.dtype])
                if results[spec.name].nbytes > self._buffers.sizes[spec.name]:
                    raise BundleError(f"{spec.name} has shape {shape}, more than the manifest's axes allow",
                                      where=self.name, fix="build the bundle again")
                self._device.download(results[spec.name], self._address(spec.name))
            self._device.synchronize()
            return results

    def _select(self, profile: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Switch profile and shapes only where they changed: both make TensorRT plan its memory again."""
        if profile != self._active:
            self._require(self._context.set_optimization_profile_async(profile, self._device.stream), "profile")
            self._device.synchronize()
            for spec in (*self.component.inputs, *self.component.outputs):
                self._require(self._context.set_tensor_address(spec.name, self._address(spec.name)), spec.name)
            self._active, self._shapes = profile, {}
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._require(self._context.set_input_shape(name, shape), f"{name} {shape}")
        self._shapes = shapes

    def _execute(self, key: _Key) -> None:
        """Run, record on the second sight of these shapes (the first lets TensorRT allocate), replay from then on."""
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            self._device.launch(graph)
            return
        if self._records and key in self._seen:
            self._device.begin_capture()
            try:
                enqueued = self._context.execute_async_v3(self._device.stream)
            finally:
                graph = self._device.end_capture()
            self._require(enqueued, "recording")
            self._graphs[key] = graph
            if len(self._graphs) > GRAPHS_KEPT:
                self._device.release(self._graphs.popitem(last=False)[1])
            self._device.launch(graph)
            return
        self._require(self._context.execute_async_v3(self._device.stream), "running")
        if key not in self._seen:
            self._seen.add(key)
            self._keep_kernels()

    def _load(self, file: Path, weights: Path | None) -> Any:
        """Deserialize from mapped memory, and fill in the weights of a stripped engine."""
        runtime = self._trt.Runtime(self._logger)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._check_validity(runtime, content)
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UnavailableError("TensorRT does not load the engine", where=self.name,
                                   fix="build the bundle on this machine")
        self._runtime = runtime
        if weights is not None and known(self.component.details, "stripped"):
            refitter = self._trt.Refitter(engine, self._logger)
            parser = self._trt.OnnxParserRefitter(refitter, self._logger)
            if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
                raise BundleError(f"the weights of {weights.name} do not fit the engine", where=self.name,
                                  fix="build the bundle again")
        if known(self.component.details, "weight_streaming"):
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        stated = {s.name for s in (*self.component.inputs, *self.component.outputs)}
        if names != stated or engine.num_optimization_profiles != len(self._profiles):
            raise BundleError(f"the engine has {sorted(names)} and {engine.num_optimization_profiles} profiles, the "
                              f"manifest {sorted(stated)} and {len(self._profiles)}", where=self.name,
                              fix="build the bundle again")
        return engine

    def _check_validity(self, runtime: Any, content: mmap.mmap) -> None:
        """TensorRT-RTX can say what is wrong from the header; `tensorrt` says it when it loads."""
        if not hasattr(runtime, "get_engine_validity"):
            return
        validity, found = runtime.get_engine_validity(content)
        members = getattr(self._trt, "EngineInvalidityDiagnostics", None)
        names = [n for n, member in members.__members__.items() if int(found) & int(member)] if members else []
        # SUBOPTIMAL runs, on kernels for a related GPU.
        check_validity(validity != self._trt.EngineValidity.INVALID, names, self.name)

    def _new_context(self, builder: str) -> Any:
        if builder == "tensorrt":
            return self._require(self._engine.create_execution_context(), "context")
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._cache_file = runtime_cache_file(cache_folder(), self.component, self._device.name, self._trt.__version__)
        if self._cache_file.is_file():
            self._cache.deserialize(self._cache_file.read_bytes())  # refuses, by itself, what does not fit
        config.set_runtime_cache(self._cache)
        return self._require(self._engine.create_execution_context(config), "context")

    def _keep_kernels(self) -> None:
        """Write what TensorRT-RTX compiled for new shapes, for the next process. Failing is no error."""
        if self._cache is None or self._cache_file is None:
            return
        partial = self._cache_file.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._cache_file)
        except OSError:
            partial.unlink(missing_ok=True)

    def _address(self, name: str) -> int:
        return self._base + self._buffers.offsets[name]

    def _require(self, answer: Any, doing: str) -> Any:
        """TensorRT says no by False or None, and why on its log."""
        if answer is None or answer is False:
            raise DeployError(f"TensorRT failed ({doing}); its log on stderr says why", where=self.name)
        return answer


def open_device() -> Device:
    """The GPU.

    Raises:
        UnavailableError: cuda-bindings, the driver or a GPU is missing.
    """
    return CudaDevice()


def load_module(builder: str, where: str) -> Any:
    """The module that runs a builder's engines.

    Raises:
        UnavailableError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(MODULES[builder])
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{builder} is not installed", where=where,
                               fix=f"{PACKAGES[builder]} on a machine with an NVIDIA GPU") from error


def cache_folder() -> Path:
    """Where TensorRT-RTX's compiled kernels are kept."""
    folder = cache_home() / "tensorrt-rtx"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
