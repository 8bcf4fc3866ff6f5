"""The session that runs an engine of TensorRT or TensorRT for RTX, checked against the manifest before it runs."""

from __future__ import annotations

import importlib
import mmap
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends.session import Arrays, Session, SessionOptions
from runtimes.backends.tensorrt.contexts import Contexts
from runtimes.backends.tensorrt.cuda_device import CudaDevice
from runtimes.backends.tensorrt.engine_errors import TensorRtErrors
from runtimes.backends.tensorrt.engine_plan import (
    MODULES,
    PACKAGES,
    ShapeLimits,
    check_builder,
    check_engine_profiles,
    check_gpu,
    check_header,
    check_tensors,
    check_validity,
    check_version,
    choose_profile,
    plan_buffers,
    profiles_of,
    runtime_cache_file,
)
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use
from runtimes.system.device import Device

RTX_RECORDS = "TensorRT for RTX records by itself"
STREAMED = "weights are streamed, which a CUDA graph cannot hold"


class TensorRtSession(Session):
    """A component as a TensorRT engine. It has code for GPUs alone: the default device, the CPU, means the first GPU.

    Calls are serialized: they share one set of buffers. Shapes that come again are recorded as a CUDA graph, and later
    calls replay it (`contexts`); TensorRT for RTX does the same inside, and keeps the kernels that it compiles
    for the user's GPU in a file.
    """

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        """Load the engine.

        Raises:
            BundleError: the file is damaged, or the manifest does not describe it.
            InputError: it does not run on that kind of device.
            UnavailableError: TensorRT, the driver or GPU memory is missing, or it is another GPU's or release's engine.
        """
        component = bundle.component(name)
        super().__init__(name, component)
        file = bundle.file(component.file)
        with file.open("rb") as stream:
            check_header(stream.read(64), file.stat().st_size, name)
        self._profiles = profiles_of(component, name)
        plan_buffers(component, name)  # refuses what has no size, before a driver is asked
        builder = check_builder(component, name)
        check_device(builder, options.device, name)
        trt = load_module(builder, name)
        check_version(component, trt.__version__, name)
        weights = component.details_as(EngineDetails).weights
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = _Loaded(name, component, builder, trt, file,
                                               bundle.file(weights) if weights else None, options.device.index)
        self._closing = weakref.finalize(self, self._loaded.close)
        self._closing.atexit = False  # the driver is gone by then

    @property
    def not_recorded(self) -> str:
        """Why calls are not recorded as CUDA graphs; empty while they are."""
        return self._loaded.contexts.not_recorded if self._loaded is not None else "the session is closed"

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        profile = choose_profile(self._profiles, {s.name: feeds[s.name].shape for s in self.component.inputs},
                                 self.name)
        with self._lock:
            assert self._loaded is not None  # `run` refuses a closed session
            return self._loaded.run(profile, feeds)

    def _close(self) -> None:
        self._loaded = None
        self._closing()  # graphs, contexts, memory, the stream and the engine


class _Loaded:
    """What an open session holds on the GPU, released as a whole: also when loading fails half-way.

    An engine belongs to the GPU that was current when it was deserialized, and its contexts with it; whichever thread
    runs them must have made that GPU its own (TensorRT's documentation, "How do I use TensorRT on multiple GPUs?").
    """

    def __init__(self, name: str, component: Component, builder: str, trt: Any, file: Path,
                 weights: Path | None, gpu: int) -> None:
        self._name, self._component, self._trt = name, component, trt
        self._cache: Any = None
        self._cache_file: Path | None = None
        self._shapes_seen: set[tuple[tuple[int, ...], ...]] = set()
        self._device = CudaDevice(gpu)
        try:
            check_gpu(component, self._device.name, self._device.capability, name)
            self._errors = TensorRtErrors(trt, name)
            self._logger = trt.Logger(trt.Logger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            self._runtime.error_recorder = self._errors.recorder
            self._engine = self._load(file, weights)
            self.contexts = self._make_contexts(builder)
        except BaseException:
            self.close()
            raise

    def run(self, profile: int, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one call on the calling thread."""
        self._device.activate()
        results = self.contexts.run(profile, feeds)
        shapes = tuple(feeds[spec.name].shape for spec in self._component.inputs)
        if self._cache is not None and shapes not in self._shapes_seen:
            self._shapes_seen.add(shapes)
            self._keep_kernels()
        return results

    def close(self) -> None:
        """Release everything, in the order that TensorRT asks for: contexts, engine, runtime; CUDA's last."""
        with suppress(DeployError):  # a GPU that has failed has nothing left to give back
            self._device.activate()
        contexts = getattr(self, "contexts", None)
        if contexts is not None:
            contexts.close()
        self._cache = self._engine = self._runtime = None
        self._device.close()

    def _load(self, file: Path, weights: Path | None) -> Any:
        """Deserialize from mapped memory, fill in the weights of a stripped engine, and compare with the manifest."""
        options = self._component.details_as(EngineDetails).options
        if options.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such plans hold the lean runtime, which is code
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._check_validity(content)
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            error = self._errors.explained("loading the engine")
            if isinstance(error, UnavailableError):
                raise error
            raise UnavailableError(f"TensorRT does not load the engine: {error.what}", where=self._name,
                                   fix="build the bundle on this machine")
        if weights is not None and options.stripped:
            refitter = self._trt.Refitter(engine, self._logger)
            parser = self._trt.OnnxParserRefitter(refitter, self._logger)
            if not (parser.refit_from_file(str(weights)) and refitter.refit_cuda_engine()):
                raise BundleError(f"the weights of {weights.name} do not fit the engine", where=self._name,
                                  fix="build the bundle again")
        if options.weight_streaming:
            # The binding drops the setter's answer: what was not taken shows when it is read back.
            engine.weight_streaming_budget_v2 = budget = engine.get_weight_streaming_automatic_budget()
            if engine.weight_streaming_budget_v2 != budget:
                raise self._errors.explained(f"weight streaming budget of {budget} bytes")
        self._check_engine(engine)
        return engine

    def _check_engine(self, engine: Any) -> None:
        """Names, directions, types, places and profiles as the manifest says: a difference would corrupt memory.

        Raises:
            BundleError: the first difference.
        """
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        check_tensors(self._component, {n: (engine.get_tensor_mode(n).name, engine.get_tensor_dtype(n).name)
                                        for n in names}, self._name)
        if hosted := [n for n in names if engine.get_tensor_location(n) != self._trt.TensorLocation.DEVICE]:
            raise BundleError(f"{hosted[0]} must lie in host memory, as the value of a shape", where=self._name,
                              fix="build the bundle again")
        inputs = [spec.name for spec in self._component.inputs]
        found = [{n: ShapeLimits(*(tuple(int(d) for d in shape) for shape in engine.get_tensor_profile_shape(n, i)))
                  for n in inputs} for i in range(engine.num_optimization_profiles)]
        check_engine_profiles(profiles_of(self._component, self._name), found, self._name)

    def _check_validity(self, content: mmap.mmap) -> None:
        """TensorRT-RTX can say what is wrong from the header; `tensorrt` says it when it loads."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, found = self._runtime.get_engine_validity(content)
        members = getattr(self._trt, "EngineInvalidityDiagnostics", None)
        names = [n for n, member in members.__members__.items() if int(found) & int(member)] if members else []
        # SUBOPTIMAL runs, on kernels for a related GPU.
        check_validity(validity != self._trt.EngineValidity.INVALID, names, self._name)

    def _make_contexts(self, builder: str) -> Contexts:
        """How contexts are made: each of `tensorrt` in memory of ours, that of TensorRT for RTX with its kernels."""
        plan = plan_buffers(self._component, self._name)
        if builder == "tensorrt":
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            streamed = STREAMED if self._component.details_as(EngineDetails).options.weight_streaming else ""
            return Contexts(self._component, self._device, self._errors, plan,
                            lambda: self._engine.create_execution_context(strategy),
                            most_memory=int(self._engine.device_memory_size_v2), not_recorded=streamed)
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._cache_file = runtime_cache_file(cache_folder(), self._component, self._device.name,
                                              self._trt.__version__)
        if self._cache_file.is_file() and use(self._cache_file):
            self._cache.deserialize(self._cache_file.read_bytes())  # refuses, by itself, what does not fit
        self._errors.require(config.set_runtime_cache(self._cache), "setting the runtime cache")
        return Contexts(self._component, self._device, self._errors, plan,
                        lambda: self._engine.create_execution_context(config), not_recorded=RTX_RECORDS)

    def _keep_kernels(self) -> None:
        """Write what TensorRT-RTX compiled for new shapes, for the next process. Failing is no error."""
        if self._cache_file is None:
            return
        partial = self._cache_file.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._cache_file)
        except OSError:
            partial.unlink(missing_ok=True)


def check_device(builder: str, device: Device, where: str) -> None:
    """Refuse a device that engines of this builder know nothing of.

    Raises:
        InputError: names those that they run on.
    """
    if device.kind not in ("cpu", "cuda", builder):
        raise InputError(f"an engine of {builder} does not run on {device.kind!r}", where=f"{where}, device",
                         fix=f"leave it out, or use {builder} or cuda, with the GPU's number: {builder}:1")


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
