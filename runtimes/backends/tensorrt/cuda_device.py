"""The few CUDA calls that running an engine needs, through cuda-bindings: one stream, memory, captured graphs."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from runtimes.errors import DeployError, OutOfMemoryError, UnavailableError
from runtimes.system.nvidia import find_gpu


class CudaDevice:
    """One GPU, as CUDA counts them, with one stream that does not wait for the default one.

    Addresses and the stream are plain integers; graphs are cuda-bindings' own objects. What was not given back is
    given back by `close`.

    Attributes:
        name: of the GPU.
        capability: its compute capability, major and minor.
        stream: handle.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Open it.

        Args:
            ordinal: which one, in this process's count: 0 is the first that CUDA_VISIBLE_DEVICES leaves.

        Raises:
            UnavailableError: cuda-bindings, the driver or the GPU is missing.
        """
        gpu = find_gpu(ordinal)
        self._cuda = load_runtime()
        self._ordinal, self.name, self.capability = ordinal, gpu.name, gpu.capability
        self._allocated: set[int] = set()
        self._graphs: list[Any] = []
        self._open = True
        self.activate()
        self.stream = int(self._checked(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking)))

    def activate(self) -> None:
        """Make it the GPU of the calling thread: CUDA keeps that for each thread, and starts at the first GPU.

        It stays so: setting another one back would make CUDA open that one, too (cudaSetDevice, from CUDA 12 on).
        """
        self._checked(self._cuda.cudaSetDevice(self._ordinal))

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes.

        Raises:
            OutOfMemoryError: the GPU has too little left.
        """
        address = int(self._checked(self._cuda.cudaMalloc(size)))
        self._allocated.add(address)
        return address

    def free(self, address: int) -> None:
        """Give memory back."""
        self._allocated.discard(address)
        self._checked(self._cuda.cudaFree(address))

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copy a contiguous array, any values of any shape and dtype, to the device, in stream order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Copy from the device into a contiguous array, any values of any shape and dtype, in stream order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._checked(self._cuda.cudaStreamSynchronize(self.stream))

    def begin_capture(self) -> None:
        """Record what this thread puts on the stream instead of running it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked(self._cuda.cudaStreamBeginCapture(self.stream, mode))

    def end_capture(self) -> Any:
        """The recording, ready to launch.

        Raises:
            DeployError: something that cannot be recorded ended the capture.
        """
        recorded = self._checked(self._cuda.cudaStreamEndCapture(self.stream))
        try:
            graph = self._checked(self._cuda.cudaGraphInstantiate(recorded, 0))
        finally:
            self._cuda.cudaGraphDestroy(recorded)
        self._graphs.append(graph)
        return graph

    def abandon_capture(self) -> None:
        """End a capture that failed, and forget the error, as TensorRT's own sample does (sampleDevice.h)."""
        status, recorded = self._first(self._cuda.cudaStreamEndCapture(self.stream))
        if status == self._cuda.cudaError_t.cudaSuccess:
            self._cuda.cudaGraphDestroy(recorded)
        self._cuda.cudaGetLastError()

    def launch(self, graph: Any) -> None:
        """Run a recording on the stream."""
        self._checked(self._cuda.cudaGraphLaunch(graph, self.stream))

    def release(self, graph: Any) -> None:
        """Give a recording back."""
        self._graphs.remove(graph)
        self._checked(self._cuda.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        """Give recordings, memory and the stream back. Never raises: a failed GPU has nothing left to give back."""
        if not self._open:
            return
        self._open = False
        self._cuda.cudaSetDevice(self._ordinal)
        self._cuda.cudaStreamSynchronize(self.stream)
        for graph in self._graphs:
            self._cuda.cudaGraphExecDestroy(graph)
        for address in self._allocated:
            self._cuda.cudaFree(address)
        self._cuda.cudaStreamDestroy(self.stream)
        self._graphs.clear()
        self._allocated.clear()

    def _checked(self, answer: Any) -> Any:
        """The value of a CUDA call, its status checked."""
        status, value = self._first(answer)
        if status == self._cuda.cudaError_t.cudaSuccess:
            return value
        self._cuda.cudaGetLastError()  # or the next call of another library would report this error as its own
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError("the GPU is out of memory", where=self.name, fix="use a smaller batch or size")
        raise DeployError(f"CUDA: {self._text(status)}", where=self.name)

    @staticmethod
    def _first(answer: Any) -> tuple[Any, Any]:
        return answer[0], answer[1] if len(answer) > 1 else None

    def _text(self, status: Any) -> str:
        text = self._cuda.cudaGetErrorString(status)[1]
        return text.decode() if isinstance(text, bytes) else str(text)


def load_runtime() -> Any:
    """CUDA's runtime API.

    Raises:
        UnavailableError: cuda-bindings is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as error:
        raise UnavailableError("cuda-bindings is not installed", where="device",
                               fix="pip install 'cuda-bindings>=13', which the extras tensorrt and tensorrt-rtx bring"
                               ) from error
