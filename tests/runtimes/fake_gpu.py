"""A GPU and a TensorRT of numpy: memory is a byte array, an engine computes y = x @ w + b, graphs are replayed."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtimes.errors import UnavailableError

W = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.array([1, 2, 3], np.float32)


class FakeDevice:
    """Counts what is asked of it in `log`; runs work at once, or records it while a capture is open."""

    name, capability, stream = "NVIDIA Fake", (8, 9), 7

    def __init__(self, memory_bytes: int = 1 << 20) -> None:
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.log: list[str] = []
        self.recording: list[Any] | None = None
        self._next = 256

    def allocate(self, size: int) -> int:
        if self._next + size > self.memory.nbytes:
            raise UnavailableError("the GPU is out of memory", where=self.name)
        address, self._next = self._next, self._next + size
        self.log.append(f"allocate {size}")
        return address

    def free(self, address: int) -> None:
        self.log.append("free")

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.memory[address:address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = self.view(address, array.shape, array.dtype)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address:address + size].view(dtype).reshape(shape)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def submit(self, work: Any) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()

    def begin_capture(self) -> None:
        self.recording = []

    def end_capture(self) -> Any:
        graph, self.recording = self.recording, None
        self.log.append("capture")
        return graph

    def launch(self, graph: Any) -> None:
        self.log.append("launch")
        for work in graph:
            work()

    def release(self, graph: Any) -> None:
        self.log.append("release")


class Context:
    """Fails where real TensorRT would: a shape outside the active profile, an address that was not set."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == FakeDevice.stream
        self.engine.device.log.append(f"profile {index}")
        self.profile, self.shapes = index, {}
        return 0 <= index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.limits[self.profile]
        self.shapes[name] = shape
        self.engine.device.log.append(f"shape {shape[0]}")
        return low <= shape[0] <= high

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["x"][0], 3)

    def execute_async_v3(self, stream: int) -> bool:
        shape, device, addresses = self.shapes["x"], self.engine.device, dict(self.addresses)

        def work() -> None:
            x = device.view(addresses["x"], shape, np.float32)
            device.view(addresses["y"], (shape[0], 3), np.float32)[...] = x @ W + B

        self.engine.device.log.append("execute")
        device.submit(work)
        return not self.engine.fails


class Cache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self.content + b"kernels;"


class RuntimeConfig:
    cuda_graph_strategy: Any = None
    cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Engine:
    names = ("x", "y")

    def __init__(self, device: FakeDevice, limits: list[tuple[int, int]]) -> None:
        self.device, self.limits, self.fails = device, limits, False
        self.num_io_tensors, self.num_optimization_profiles = 2, len(limits)
        self.weight_streaming_budget_v2 = 0
        self.config: RuntimeConfig | None = None

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        self.config = config
        return Context(self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def get_weight_streaming_automatic_budget(self) -> int:
        return 123


class Validity(enum.Enum):
    INVALID = 0
    SUBOPTIMAL = 1
    VALID = 2


class Diagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2


def module(engine: Engine | None, *, version: str = "11.4.0", validity: tuple[Validity, int] | None = None,
           refits: list[str] | None = None, fits: bool = True) -> Any:
    """A module `tensorrt` (or `tensorrt_rtx`, if it can tell an engine's validity)."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, content: Any) -> Engine | None:
            assert bytes(content[1:4]) == b"trt"
            return engine

    if validity is not None:
        Runtime.get_engine_validity = lambda self, content: validity  # type: ignore[attr-defined]

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    def refit_from_file(file: str) -> bool:
        if refits is not None:
            refits.append(file)
        return fits

    parser = SimpleNamespace(refit_from_file=refit_from_file)
    return SimpleNamespace(
        __version__=version, Runtime=Runtime, Logger=Logger, EngineValidity=Validity,
        EngineInvalidityDiagnostics=Diagnostics, CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        Refitter=lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: True),
        OnnxParserRefitter=lambda refitter, logger: parser)
