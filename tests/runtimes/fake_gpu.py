"""A CUDA runtime of numpy as strict as the real one: argument counts and kinds come from cuda-bindings' own signatures,
memory has bounds, a capture refuses what CUDA refuses, and what is used after it was given back is an error.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

from runtimes.errors import UnavailableError
from runtimes.system.nvidia import Gpu

GPU = Gpu("NVIDIA Fake", (8, 9), 1 << 20)
SECOND_GPU = Gpu("NVIDIA Fake 2", (8, 9), 1 << 20)
ERROR = real.cudaError_t
ALIGNMENT = 256  # "any address of a variable ... is always aligned to at least 256 bytes" (CUDA C++ guide, 5.3.2)


def signature(name: str) -> list[str]:
    """The parameters of a cuda-bindings function as its docstring declares them, `size_t count` or `kind: Enum`."""
    first = (getattr(real, name).__doc__ or "").splitlines()[0]
    inside = re.fullmatch(rf"{name}\((.*)\)", first)
    assert inside, f"cuda-bindings documents no {name}: {first!r}"
    return [part.strip() for part in inside[1].split(",") if part.strip()]


def strict(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses what cuda-bindings would: another number of arguments, no integer, another enumeration."""
    declared = signature(method.__name__)

    @functools.wraps(method)
    def checked(self: FakeCuda, *arguments: Any) -> Any:
        assert len(arguments) == len(declared), f"{method.__name__} takes {declared}, got {arguments}"
        for text, value in zip(declared, arguments, strict=True):
            if ": " in text:
                assert isinstance(value, getattr(real, text.partition(": ")[2])), f"{text}: {value!r}"
            elif " " in text:
                assert isinstance(value, int | np.integer), f"{text}: {value!r}"
        return method(self, *arguments)

    return checked


@dataclass
class Recording:
    """A cudaGraph_t or, instantiated, a cudaGraphExec_t."""

    work: list[Callable[[], None]]
    alive: bool = True


@dataclass
class FakeCuda:
    """The functions that `CudaDevice` calls. Every one answers as cuda-bindings does: a tuple, the status first.

    Memory and streams are of the GPU `ordinal`; whoever uses them must have made it the thread's current one.
    """

    memory_bytes: int = 1 << 20
    ordinal: int = 0
    gpus: list[Gpu] = field(default_factory=lambda: [GPU, SECOND_GPU])
    log: list[str] = field(default_factory=list)
    allocations: dict[int, np.ndarray] = field(default_factory=dict)
    streams: set[int] = field(default_factory=set)
    graphs: list[Recording] = field(default_factory=list)
    capturing: list[Callable[[], None]] | None = None
    invalidated: bool = False
    last_error: Any = ERROR.cudaSuccess
    fail_instantiate: bool = False

    def __post_init__(self) -> None:
        self._next, self._current = 0x7F0000000000, threading.local()

    def __getattr__(self, name: str) -> Any:
        """Constants and enumerations are the real ones; a function that is not faked is missing."""
        value = getattr(real, name)
        if callable(value) and not isinstance(value, type):
            raise AttributeError(f"the fake has no {name}")
        return value

    def leaks(self) -> list[str]:
        """What was never given back."""
        return [*(f"{a.nbytes} bytes" for a in self.allocations.values()), *(f"stream {s}" for s in self.streams),
                *("graph" for g in self.graphs if g.alive)]

    def _answer(self, status: Any, *values: Any) -> tuple[Any, ...]:
        if status != ERROR.cudaSuccess:
            self.last_error = status
        return status, *values

    def _illegal_while_capturing(self) -> bool:
        """cudaStreamCaptureModeThreadLocal: potentially unsafe calls of the thread fail and invalidate the capture."""
        if self.capturing is None:
            return False
        self.invalidated = True
        return True

    def find_gpu(self, ordinal: int = 0) -> Gpu:
        """In place of `runtimes.system.nvidia.find_gpu`, which asks the driver."""
        if ordinal >= len(self.gpus):
            raise UnavailableError(f"CUDA shows {len(self.gpus)} GPUs, number {ordinal} is not among them")
        return self.gpus[ordinal]

    def here(self) -> None:
        """Refuse a thread that has another GPU."""
        current = getattr(self._current, "ordinal", 0)
        assert current == self.ordinal, f"device {current} is current in this thread, the memory is of {self.ordinal}"

    @strict
    def cudaSetDevice(self, device: int) -> Any:
        if not 0 <= device < len(self.gpus):
            return self._answer(ERROR.cudaErrorInvalidDevice)
        self._current.ordinal = device
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.here()
        assert flags == real.cudaStreamNonBlocking
        self.streams.add(7)
        return self._answer(ERROR.cudaSuccess, real.cudaStream_t(7))

    @strict
    def cudaStreamDestroy(self, stream: int) -> Any:
        self.here()
        self.streams.remove(int(stream))
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert int(stream) in self.streams
        if self._illegal_while_capturing():
            return self._answer(ERROR.cudaErrorStreamCaptureUnsupported)
        self.log.append("synchronize")
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaMalloc(self, size: int) -> Any:
        self.here()
        if self._illegal_while_capturing():
            return self._answer(ERROR.cudaErrorStreamCaptureUnsupported, 0)
        if sum(a.nbytes for a in self.allocations.values()) + size > self.memory_bytes:
            return self._answer(ERROR.cudaErrorMemoryAllocation, 0)
        address, self._next = self._next, self._next + -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.allocations[address] = np.full(size, 0xAA, np.uint8) if size < 1 << 22 else np.zeros(size, np.uint8)
        self.log.append(f"allocate {size}")
        return self._answer(ERROR.cudaSuccess, address)

    @strict
    def cudaMemGetInfo(self) -> Any:
        used = sum(a.nbytes for a in self.allocations.values())
        return self._answer(ERROR.cudaSuccess, self.memory_bytes - used, self.memory_bytes)

    @strict
    def cudaFree(self, devPtr: int) -> Any:
        self.here()
        if self._illegal_while_capturing():
            return self._answer(ERROR.cudaErrorStreamCaptureUnsupported)
        del self.allocations[devPtr]
        self.log.append("free")
        return self._answer(ERROR.cudaSuccess)

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes of device memory.

        Raises:
            AssertionError: not all of them lie in one allocation that was not given back.
        """
        for start, memory in self.allocations.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start:address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are outside of every allocation")

    @strict
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Any:
        assert int(stream) in self.streams
        self.here()
        kinds = real.cudaMemcpyKind
        if kind == kinds.cudaMemcpyDeviceToDevice:
            self.submit(lambda: np.copyto(self.view(dst, count), self.view(src, count)))
            return self._answer(ERROR.cudaSuccess)
        assert self.capturing is None, "copies of host memory are not part of what we capture"
        upload = kind == kinds.cudaMemcpyHostToDevice
        device = self.view(dst if upload else src, count).ctypes.data
        ctypes.memmove(device if upload else dst, src if upload else device, count)
        return self._answer(ERROR.cudaSuccess)

    def submit(self, work: Callable[[], None]) -> None:
        """A kernel: runs at once, or is recorded."""
        self.here()
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            work()

    @strict
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        assert int(stream) in self.streams
        if self.capturing is not None:
            return self._answer(ERROR.cudaErrorIllegalState)
        self.capturing, self.invalidated = [], False
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaStreamEndCapture(self, stream: int) -> Any:
        """"If capture was invalidated ... then a NULL graph will be returned" (cuda-bindings, cudaStreamEndCapture)."""
        assert self.capturing is not None, "no capture is open"
        work, self.capturing = self.capturing, None
        if self.invalidated:
            return self._answer(ERROR.cudaErrorStreamCaptureInvalidated, None)
        self.graphs.append(Recording(work))
        self.log.append("capture")
        return self._answer(ERROR.cudaSuccess, self.graphs[-1])

    @strict
    def cudaGraphInstantiate(self, graph: Recording, flags: int) -> Any:
        assert graph.alive
        if self.fail_instantiate:
            return self._answer(ERROR.cudaErrorInvalidValue, None)
        self.graphs.append(Recording(graph.work))
        return self._answer(ERROR.cudaSuccess, self.graphs[-1])

    @strict
    def cudaGraphDestroy(self, graph: Recording) -> Any:
        assert graph.alive
        graph.alive = False
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaGraphExecDestroy(self, graph: Recording) -> Any:
        assert graph.alive, "destroyed twice"
        graph.alive = False
        self.log.append("release")
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaGraphLaunch(self, graph: Recording, stream: int) -> Any:
        assert graph.alive and int(stream) in self.streams
        self.here()
        self.log.append("launch")
        for work in graph.work:
            work()
        return self._answer(ERROR.cudaSuccess)

    @strict
    def cudaGetLastError(self) -> Any:
        status, self.last_error = self.last_error, ERROR.cudaSuccess
        return (status,)

    @strict
    def cudaGetErrorString(self, error: Any) -> Any:
        return real.cudaGetErrorString(error)
