"""The session that runs a component by ONNX Runtime, whose exceptions are translated here and nowhere else."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from runtimes.backends import optimized_graphs
from runtimes.backends.session import Arrays, Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import DTYPES
from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use
from runtimes.system.device import Device

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# device -> the provider, and what runs the nodes that it does not take; ORT adds the CPU by itself.
PROVIDER_LISTS = {"cpu": ("cpu",), "cuda": ("cuda",), "tensorrt": ("tensorrt", "cuda")}
# Both providers are parts of onnxruntime-gpu, which [gpu] alone brings; it loads TensorRT's libraries by itself.
PACKAGES = {
    "cuda": "pip install 'ldm-deploy[gpu]' on a machine with an NVIDIA GPU, or use --device cpu",
    "tensorrt": "pip install 'ldm-deploy[gpu]', and the TensorRT release that onnxruntime.ai lists for it, on a "
                "machine with an NVIDIA GPU, or use --device cpu",
}
# Operators that work out shapes; ORT itself moves them to the CPU where shapes are (fallback_cpu_capability.cc).
SHAPE_OPERATORS = frozenset((
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
    "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split",
    "Squeeze", "Sub", "Unsqueeze", "Where"))
# Newer releases say where each node runs; older ones can only refuse the CPU to all of them, shapes included.
RECORDS_PLACEMENT = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
_OUT_OF_MEMORY = re.compile(r"out of memory|failed to allocate|bad[ _]alloc|ALLOC_FAILED|BFCArena", re.IGNORECASE)
_ORT_ERRORS = tuple(
    getattr(failures, name)
    for name in ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel",
                 "NoSuchFile", "NotImplemented", "RuntimeException")
)


class OrtSession(Session):
    """A component on ONNX Runtime.

    On the CPU the arrays are handed over without a copy. On a device the outputs are bound to buffers that each thread
    reuses while shapes stay the same, and copied to the host once.
    """

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        """Load the component.

        Raises:
            BundleError: the graph is corrupt or ORT has no kernel for it.
            InputError: the device is another backend's, or would compute the graph in another precision.
            UnavailableError: the device or its memory is missing; never a silent fall back to the CPU.
        """
        component = bundle.component(name)
        super().__init__(name, component)
        device = options.device
        provider = available_provider(device.kind)
        check_arithmetic(component, device.kind, name)
        self._outputs = [spec.name for spec in component.outputs]
        graph = bundle.file(component.file)
        providers = [(PROVIDERS[kind], provider_options(Device(kind, device.index), component))
                     for kind in PROVIDER_LISTS[device.kind]]

        def open_graph(file: Path, settings: ort.SessionOptions) -> ort.InferenceSession:
            # Without its fall-back, which prints, and goes on with another provider where this one fails.
            return ort.InferenceSession(str(file), settings, providers=providers, enable_fallback=0)

        with _translated(name):
            if options.keep_graphs and device.kind == "cpu" and component.bytes > optimized_graphs.ABOVE_BYTES:
                self._session = optimized_graphs.open_stored(
                    graph, component, lambda: session_options(component, options), open_graph, cache_place() / "cpu")
            else:
                self._session = open_graph(graph, session_options(component, options))
        if provider not in self._session.get_providers():
            raise UnavailableError(f"ONNX Runtime could not start {provider} and would have used the CPU", where=name,
                                   fix=PACKAGES.get(device.kind, ""))
        if device.kind != "cpu":
            check_placement(self._session, device.kind, name)
        self._check_names()
        self._bound = _BoundRunner(self._session, component, "cuda", device.index) if device.kind != "cpu" else None

    def _close(self) -> None:
        del self._session, self._bound  # ONNX Runtime frees weights and arenas with the last reference

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        try:
            if self._bound is not None:
                return self._bound.run(feeds)
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except _ORT_ERRORS as error:
            raise _explained(error, self.name, running=True) from error

    def _check_names(self) -> None:
        for kind, stated, found in (
            ("inputs", self.component.inputs, self._session.get_inputs()),
            ("outputs", self.component.outputs, self._session.get_outputs()),
        ):
            if {s.name for s in stated} != (names := {f.name for f in found}):
                raise BundleError(f"the graph's {kind} {sorted(names)} are not the manifest's "
                                  f"{sorted(s.name for s in stated)}", where=self.name, fix="build the bundle again")


class _BoundRunner:
    """Runs with IO binding. Device buffers belong to a thread, so concurrent calls never share one."""

    def __init__(self, session: ort.InferenceSession, component: Component, memory: str, index: int) -> None:
        """Bind to the memory of a device.

        Args:
            session: runs on the device.
            component: names, dtypes and shapes.
            memory: ONNX Runtime's name of the memory, "cuda" or "cpu".
            index: of the device.
        """
        self._session, self._component, self._memory, self._index = session, component, memory, index
        self._local = threading.local()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        sizes = {d: n for spec in self._component.inputs
                 for d, n in zip(spec.shape, feeds[spec.name].shape, strict=True) if isinstance(d, str)}
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        buffers = {}
        for spec in self._component.outputs:
            if all(d in sizes for d in spec.shape if isinstance(d, str)):
                buffers[spec.name] = self._buffer(spec.name, spec.resolve(sizes), DTYPES[spec.dtype])
                binding.bind_ortvalue_output(spec.name, buffers[spec.name])
            else:
                binding.bind_output(spec.name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = zip((s.name for s in self._component.outputs), binding.get_outputs(), strict=True)
        return {name: np.array(value.numpy()) for name, value in outputs}

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
        cache: dict[str, tuple[tuple[int, ...], ort.OrtValue]] = self._local.__dict__.setdefault("buffers", {})
        if name not in cache or cache[name][0] != shape:
            cache[name] = shape, ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._memory,
                                                                         self._index)
        return cache[name][1]


def available_provider(device: str) -> str:
    """ORT's name of the provider for a kind of device.

    Raises:
        InputError: no such device.
        UnavailableError: this installation of ORT lacks it.
    """
    if device == "tensorrt-rtx":
        raise InputError("ONNX Runtime runs on TensorRT for RTX through a plug-in, which is not offered here",
                         where="device", fix="build with --target tensorrt-rtx, or use --device cuda")
    if device not in PROVIDERS:
        raise InputError(f"a bundle for ONNX Runtime does not run on {device!r}", where="device",
                         fix=f"one of {', '.join(PROVIDERS)}, or build for another --target")
    provider, available = PROVIDERS[device], ort.get_available_providers()
    if provider not in available:
        raise UnavailableError(f"this ONNX Runtime {ort.__version__} has no {provider}, only {', '.join(available)}",
                               where=f"device {device}", fix=PACKAGES.get(device, ""))
    if device != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from the nvidia-* wheels
    return provider


def session_options(component: Component, options: SessionOptions) -> ort.SessionOptions:
    """Threads, optimization level and logging of a session.

    Raises:
        BundleError: the manifest states an optimization level that does not exist.
    """
    result = ort.SessionOptions()
    result.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    result.intra_op_num_threads = options.threads
    if options.pin_threads and options.device.kind == "cpu":
        threads = result.intra_op_num_threads = options.threads or os.cpu_count() or 1
        if threads > 1:  # a processor (counted from 1) for each thread but the caller's own, which ORT leaves alone
            result.add_session_config_entry("session.intra_op_thread_affinities",
                                            ";".join(str(n) for n in range(2, threads + 1)))
    result.inter_op_num_threads = 1
    result.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    result.log_severity_level = 3
    if options.device.kind != "cpu":
        if RECORDS_PLACEMENT:
            result.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        else:
            result.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Workers spin while a call lasts, for its many small operators, and sleep between calls: the components of a
    # pipeline take turns, and a spinning U-Net pool would take cores from the decoder.
    result.add_session_config_entry("session.force_spinning_stop", "1")
    return result


def provider_options(device: Device, component: Component) -> dict[str, str]:
    """Options of the execution provider, `device_id` being the GPU's number as CUDA counts (ORT's documentation)."""
    if device.kind == "cuda":
        return {
            "device_id": str(device.index),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE tunes again for every new shape
            "use_tf32": "0" if component.precision == "fp32" else "1",  # TF32 keeps 10 bits: outside fp32's budget
        }
    if device.kind == "tensorrt":
        # A folder for each component: the provider's own names hold the graph's names and not its weights.
        cache = cache_place() / "tensorrt" / component.sha256[:32]
        cache.mkdir(parents=True, exist_ok=True)
        use(cache)
        return {
            "device_id": str(device.index),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
            # Up to TensorRT 10 what a graph holds must be allowed, too; 11 goes by the graph alone.
            "trt_fp16_enable": "1" if component.precision in ("fp16", "int8") else "0",
            "trt_bf16_enable": "1" if component.precision == "bf16" else "0",
            "trt_int8_enable": "1" if component.precision == "int8" else "0",
            "trt_layer_norm_fp32_fallback": "1",
            **{f"trt_profile_{k}_shapes": text for k, text in profile_shapes(component).items()},
        }
    return {}


def check_arithmetic(component: Component, device: str, where: str) -> None:
    """Refuse a graph on a GPU that was made for CPUs: it would widen what it stores in 16 bits, and compute in float32.

    Integers are refused for the same reason: CPUs take asymmetric ones, which TensorRT does not.

    Raises:
        InputError: says how to build one that computes in what it says.
    """
    conversion = component.graph.conversion
    made_for_gpus = conversion is not None and conversion.computes
    if device != "cpu" and component.precision != "fp32" and not made_for_gpus:
        raise InputError(f"its {component.precision} is in a form for CPUs, which a GPU would compute in float32",
                         where=f"{where}, device {device}", fix=f"build with --device {device}, or with fp32")


def check_placement(session: ort.InferenceSession, device: str, where: str) -> None:
    """Refuse a session that would compute on the CPU what the device has no kernel for.

    Raises:
        UnavailableError: names the operators.
    """
    if not RECORDS_PLACEMENT:
        return  # session.disable_cpu_ep_fallback has refused it
    counts = Counter(node.op_type for part in session.get_provider_graph_assignment_info()
                     if part.ep_name == PROVIDERS["cpu"] for node in part.get_nodes())
    if left := {kind: n for kind, n in counts.items() if kind not in SHAPE_OPERATORS}:
        raise UnavailableError(f"this ONNX Runtime {ort.__version__} would compute on the CPU: "
                               f"{', '.join(f'{n} {kind}' for kind, n in sorted(left.items()))}",
                               where=f"{where}, device {device}", fix="use --device cpu, or another --target")


def profile_shapes(component: Component) -> dict[str, str]:
    """TensorRT's optimization profile, `name:1x4x8x8,...` for min, opt and max; empty if no axis is dynamic."""
    if not component.axes:
        return {}
    shapes: dict[str, str] = {}
    for kind in ("min", "opt", "max"):
        sizes: Mapping[str, int] = {name: getattr(axis.range, kind) for name, axis in component.axes.items()}
        shapes[kind] = ",".join(f"{s.name}:{'x'.join(map(str, s.resolve(sizes)))}" for s in component.inputs)
    return shapes


def cache_place() -> Path:
    """Where what ORT makes while loading is kept."""
    return cache_home() / "onnxruntime"


@contextmanager
def _translated(name: str) -> Iterator[None]:
    try:
        yield
    except DeployError:
        raise
    except Exception as error:  # ORT's binding raises its own types, ValueError and bare RuntimeError
        raise _explained(error, name, running=False) from error


def _explained(error: Exception, name: str, *, running: bool) -> DeployError:
    """ORT's exception as one of ours, most specific first."""
    line = str(error).partition("\n")[0][:400]
    if _OUT_OF_MEMORY.search(str(error)) or isinstance(error, MemoryError):
        return OutOfMemoryError(f"out of memory: {line}", where=name, fix="use a smaller batch or size")
    if running and isinstance(error, failures.InvalidArgument):
        return InputError(f"the graph does not take these inputs: {line}", where=name)
    doing = "failed while running it" if running else "cannot load it"
    return BundleError(f"ONNX Runtime {doing}: {line}", where=name, fix="build the bundle again")
