"""A TensorRT of numpy, as strict as NvInferRuntime.h (TensorRT 11.1): an engine computes y = x @ w + b.

What the header calls undefined behaviour is an AssertionError here; what it refuses is refused in the binding's way
(False, None or RuntimeError). `test_the_fake_has_the_real_bindings_names_and_arguments` compares with tensorrt_rtx.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.runtimes.fake_gpu import ALIGNMENT, FakeCuda

W = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.array([1, 2, 3], np.float32)
ROW_BYTES = 4096  # of activation memory


class DataType(enum.Enum):
    FLOAT, HALF, INT64 = range(3)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ErrorCodeTRT(enum.Enum):
    FAILED_ALLOCATION, FAILED_EXECUTION, INVALID_ARGUMENT = 5, 7, 3


class EngineValidity(enum.Enum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC = 1, 2


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class IErrorRecorder:
    pass


def integer(value: Any) -> int:
    """The binding's `typing.SupportsInt`."""
    assert isinstance(value, int | np.integer) and not isinstance(value, bool), value
    return int(value)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self._engine, self._strategy = engine, strategy
        self.active_optimization_profile = 0  # "The newly created execution context will be assigned profile 0"
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._version = 0  # of profile, shape, addresses and memory
        self._enqueued = -1  # version that was last enqueued outside of a capture

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """pyCore.cpp, context_set_optimization_profile_async: PY_ASSERT_RUNTIME_ERROR, so it raises."""
        assert stream_handle in self._engine.cuda.streams
        if not 0 <= integer(profile_index) < self._engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")
        self._engine.cuda.log.append(f"profile {profile_index}")
        self.active_optimization_profile, self._shape = profile_index, None
        self._version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple | list)
        low, high = self._engine.limits[self.active_optimization_profile]
        if name != "x" or len(shape) != 2 or shape[1] != 4 or not low <= shape[0] <= high:
            return self._engine.refuse(ErrorCodeTRT.INVALID_ARGUMENT, f"{name}: {shape} is outside the profile")
        self._shape = tuple(shape)
        self._version += 1
        self._engine.cuda.log.append(f"shape {shape[0]}")
        return True

    def infer_shapes(self) -> list[str]:
        return ["x"] if self._shape is None else []

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """"The pointer must have at least 256-byte alignment.\""""
        assert integer(memory) % ALIGNMENT == 0, memory
        self._addresses[name] = memory
        self._version += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = self._shape[0] if self._shape else -1
        return (rows, 4) if name == "x" else (rows, self._engine.columns)

    def get_max_output_size(self, name: str) -> int:
        return -1 if self._shape is None or name != "y" else self._shape[0] * self._engine.columns * 4

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self._shape is None else self._shape[0] * ROW_BYTES

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert integer(memory) % ALIGNMENT == 0 and integer(size) >= 0
        if (memory, size) != self._memory:
            self._memory, self._version = (memory, size), self._version + 1

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda, shape = self._engine, self._engine.cuda, self._shape
        assert integer(stream_handle) in cuda.streams
        if shape is None or set(self._addresses) != {"x", "y"}:
            return engine.refuse(ErrorCodeTRT.INVALID_ARGUMENT, "an input has neither shape nor address")
        if self._strategy is ExecutionContextAllocationStrategy.USER_MANAGED:
            assert self._memory is not None, "no activation memory was set"
            assert self._memory[1] >= shape[0] * ROW_BYTES, "too little activation memory"
            cuda.view(*self._memory)
        if engine.fails:
            return engine.refuse(*engine.fails)
        if cuda.capturing is not None:
            if engine.streams_weights or engine.not_capturable or self._enqueued != self._version:
                cuda.invalidated = True  # "enqueueV3 will become synchronous, and the graph will not be capturable"
                return engine.refuse(ErrorCodeTRT.FAILED_EXECUTION, "operation not permitted when stream is capturing")
        else:
            self._enqueued = self._version
        version, addresses, memory = self._version, dict(self._addresses), self._memory

        def work() -> None:
            assert self._version == version, "the context changed since its graph was captured: undefined"
            if memory is not None:
                cuda.view(*memory)
            x = cuda.view(addresses["x"], 4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
            y = cuda.view(addresses["y"], 4 * shape[0] * engine.columns).view(np.float32)
            y.reshape(shape[0], -1)[:, :3] = x @ W + B

        cuda.log.append("execute")
        cuda.submit(work)
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        self._content = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return self._content + b"kernels;"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = CudaGraphStrategy.DISABLED
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        assert isinstance(cache, IRuntimeCache)
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, cuda: FakeCuda, limits: list[tuple[int, int]], *, columns: int = 3) -> None:
        self.cuda, self.limits, self.columns = cuda, limits, columns
        self.num_io_tensors, self.num_optimization_profiles = 2, len(limits)
        self.device_memory_size_v2 = max(high for _, high in limits) * ROW_BYTES
        self.types = {"x": DataType.FLOAT, "y": DataType.FLOAT}
        self.host_code, self.streams_weights, self.not_capturable, self.contexts_left = False, False, False, 99
        self.fails: tuple[ErrorCodeTRT, str] | None = None
        self.config: IRuntimeConfig | None = None
        self.error_recorder: Any = None
        self._budget, self._contexts = 1000, 0

    def refuse(self, code: ErrorCodeTRT, text: str) -> bool:
        if self.error_recorder is not None:
            self.error_recorder.report_error(code, text)
        return False

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        low, high = self.limits[profile_index]
        return [(low, 4), (low, 4), (high, 4)]

    def create_execution_context(self, option: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        self.cuda.here()
        if self.contexts_left == 0:
            self.refuse(ErrorCodeTRT.FAILED_ALLOCATION, "Requested amount of GPU memory (2048 bytes)")
            return None
        self.contexts_left -= 1
        self._contexts += 1
        if isinstance(option, IRuntimeConfig):
            self.config, option = option, ExecutionContextAllocationStrategy.STATIC
        assert isinstance(option, ExecutionContextAllocationStrategy)
        return IExecutionContext(self, option)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def get_weight_streaming_automatic_budget(self) -> int:
        return 123

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """The header's setter answers false, which the binding drops; no change "while there are active contexts"."""
        if self.streams_weights and not self._contexts:
            self._budget = integer(budget)


class Refitter:
    fits, files = True, list[str]()

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        assert isinstance(engine, ICudaEngine)

    def refit_cuda_engine(self) -> bool:
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        assert isinstance(model, str)
        self._refitter.files.append(model)
        return self._refitter.fits


class Logger:
    ERROR = 1

    def __init__(self, min_severity: int) -> None:
        pass


def module(engine: ICudaEngine | None, *, version: str = "11.4.0", validity: tuple[EngineValidity, int] | None = None,
           fits: bool = True) -> Any:
    """A module `tensorrt`, or `tensorrt_rtx` if it can tell an engine's validity."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, Logger)
            self.engine_host_code_allowed, self.error_recorder = False, None

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            assert bytes(serialized_engine[1:4]) == b"trt"
            if engine is not None:
                engine.cuda.here()  # "bound to a specific GPU when it is instantiated"
            if engine is None or (engine.host_code and not self.engine_host_code_allowed):
                if self.error_recorder is not None:
                    self.error_recorder.report_error(ErrorCodeTRT.INVALID_ARGUMENT, "the plan is not for this runtime")
                return None
            engine.error_recorder = self.error_recorder  # "it will also be passed to the engine"
            return engine

    if validity is not None:
        Runtime.get_engine_validity = lambda self, buffer: validity  # type: ignore[attr-defined]
    refitter = type("Refitter", (Refitter,), {"fits": fits, "files": []})
    return SimpleNamespace(
        __version__=version, Runtime=Runtime, Logger=Logger, IErrorRecorder=IErrorRecorder, Refitter=refitter,
        OnnxParserRefitter=OnnxParserRefitter, EngineValidity=EngineValidity, TensorLocation=TensorLocation,
        EngineInvalidityDiagnostics=EngineInvalidityDiagnostics, CudaGraphStrategy=CudaGraphStrategy,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy)
