"""Finds the NVIDIA GPUs that CUDA shows this process, by asking the driver: the one answer to "is a GPU here".

Neither a file of the driver nor `nvidia-smi` can say: both list GPUs that `CUDA_VISIBLE_DEVICES` hides or puts in
another order, and both may be there while the driver does not start. No package is needed, only the driver's library.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from runtimes.errors import UnavailableError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
DRIVER_FIX = "install the NVIDIA driver, see that nvidia-smi works and that CUDA_VISIBLE_DEVICES names a GPU"
# CUdevice_attribute of cuda.h: the two halves of the compute capability.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU as CUDA shows it.

    Attributes:
        name: as the driver says it, "NVIDIA H100 80GB HBM3".
        capability: compute capability, major and minor.
        memory_bytes: of the whole GPU.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        """As manifests record it: "NVIDIA H100 80GB HBM3, 9.0"."""
        return f"{self.name}, {self.capability[0]}.{self.capability[1]}"


def find_gpu(ordinal: int = 0) -> Gpu:
    """The GPU of that ordinal, counted as CUDA counts them in this process.

    Raises:
        UnavailableError: no driver, or one that does not start, or no such GPU; with the driver's own words.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise _missing(f"{LIBRARY} is not here") from error
    _call(driver, "cuInit", ctypes.c_uint(0))
    count, device = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if ordinal >= count.value:
        raise _missing(f"CUDA shows {count.value} GPUs, number {ordinal} is not among them" if count.value
                       else "no NVIDIA GPU")
    _call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]), memory.value)


def gpu_or_none(ordinal: int = 0) -> Gpu | None:
    """The GPU of that ordinal, or nothing where CUDA shows none."""
    try:
        return find_gpu(ordinal)
    except UnavailableError:
        return None


def _call(driver: Any, name: str, *arguments: Any) -> None:
    """One call of the driver's API, its status checked."""
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise _missing(text.value.decode() if text.value else f"{name} answered {status}")


def _missing(reason: str) -> UnavailableError:
    return UnavailableError(f"no usable NVIDIA driver or GPU: {reason}", where="device", fix=DRIVER_FIX)
