"""The few CUDA calls that running an engine takes, by cuda-bindings: one stream, one allocation, captured graphs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from runtimes.errors import DeployError, OutOfMemoryError, UnavailableError

_DRIVER_FIX = "install the NVIDIA driver and see that nvidia-smi works"


class Device(Protocol):
    """What `TensorRtSession` needs of a GPU. Addresses and handles are plain integers."""

    name: str
    capability: tuple[int, int]
    stream: int

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copy a contiguous array to the device, in stream order."""

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Copy from the device into a contiguous array, in stream order."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def begin_capture(self) -> None:
        """Record what is put on the stream instead of running it."""

    def end_capture(self) -> Any:
        """The recording, ready to launch."""

    def launch(self, graph: Any) -> None:
        """Run a recording on the stream."""

    def release(self, graph: Any) -> None:
        """Give a recording back."""


class CudaDevice:
    """The first GPU. One stream that does not synchronize with the default one."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            UnavailableError: cuda-bindings, the driver or a GPU is missing.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UnavailableError("cuda-bindings is not installed", where="device",
                                   fix="pip install cuda-bindings") from error
        self._cuda = runtime
        status, count = self._first(runtime.cudaGetDeviceCount())
        if status != runtime.cudaError_t.cudaSuccess or not count:
            reason = self._text(status) if int(status) else "no NVIDIA GPU"
            raise UnavailableError(f"no usable NVIDIA driver: {reason}", where="device", fix=_DRIVER_FIX)
        properties = self._checked(runtime.cudaGetDeviceProperties(0))
        raw = properties.name
        self.name = raw.decode() if isinstance(raw, bytes) else str(raw)
        self.capability = (int(properties.major), int(properties.minor))
        self._checked(runtime.cudaSetDevice(0))
        self.stream = int(self._checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes.

        Raises:
            UnavailableError: the GPU has too little left.
        """
        return int(self._checked(self._cuda.cudaMalloc(size)))

    def free(self, address: int) -> None:
        """Give memory back."""
        self._checked(self._cuda.cudaFree(address))

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copy a contiguous array to the device, in stream order."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Copy from the device into a contiguous array, in stream order."""
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
        """The recording, ready to launch."""
        graph = self._checked(self._cuda.cudaStreamEndCapture(self.stream))
        try:
            return self._checked(self._cuda.cudaGraphInstantiate(graph, 0))
        finally:
            self._cuda.cudaGraphDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Run a recording on the stream."""
        self._checked(self._cuda.cudaGraphLaunch(graph, self.stream))

    def release(self, graph: Any) -> None:
        """Give a recording back."""
        self._checked(self._cuda.cudaGraphExecDestroy(graph))

    def _checked(self, answer: Any) -> Any:
        """The value of a CUDA call, its status checked."""
        status, value = self._first(answer)
        if status == self._cuda.cudaError_t.cudaSuccess:
            return value
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemoryError("the GPU is out of memory", where=self.name, fix="use a smaller batch or size")
        raise DeployError(f"CUDA: {self._text(status)}", where=getattr(self, "name", "device"))

    @staticmethod
    def _first(answer: Any) -> tuple[Any, Any]:
        return answer[0], answer[1] if len(answer) > 1 else None

    def _text(self, status: Any) -> str:
        text = self._cuda.cudaGetErrorString(status)[1]
        return text.decode() if isinstance(text, bytes) else str(text)
