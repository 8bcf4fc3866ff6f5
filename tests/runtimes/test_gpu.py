"""The GPU that CUDA shows, on a driver library that answers in Python."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from deploy.core import doctor
from deploy.passes import engine
from runtimes.errors import UnavailableError
from runtimes.system import nvidia


class Driver:
    """libcuda.so.1 with two GPUs; every argument must be what cuda.h declares, since ctypes passes on anything."""

    def __init__(self, count: int = 2, started: int = 0) -> None:
        self.count, self.started = count, started

    def cuInit(self, flags: ctypes.c_uint) -> int:
        assert isinstance(flags, ctypes.c_uint)
        return self.started

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, ordinal: ctypes.c_int) -> int:
        device._obj.value = 40 + ordinal.value
        return 0

    def cuDeviceGetName(self, name: Any, length: ctypes.c_int, device: ctypes.c_int) -> int:
        assert length.value == len(name)
        name.value = b"NVIDIA A" if device.value == 40 else b"NVIDIA B"
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:
        assert isinstance(size._obj, ctypes.c_size_t)
        size._obj.value = 80 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: ctypes.c_int, device: ctypes.c_int) -> int:
        """CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, _MINOR = 76 (cuda.h)."""
        value._obj.value = {75: 8 + device.value - 40, 76: 9}[attribute.value]
        return 0

    def cuGetErrorString(self, status: ctypes.c_int, text: Any) -> int:
        text._obj.value = b"CUDA driver version is insufficient" if status.value == 35 else None
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    return made


def test_the_gpu_is_the_one_that_cuda_shows_at_that_number(driver):
    """cuda.h, cuDeviceGet: ordinals lie "in the range [0, cuDeviceGetCount()-1]", CUDA_VISIBLE_DEVICES applied."""
    assert nvidia.find_gpu() == nvidia.Gpu("NVIDIA A", (8, 9), 80 << 30)
    assert str(nvidia.find_gpu(1)) == "NVIDIA B, 9.9"


def test_the_engine_pass_the_doctor_and_sessions_mean_the_same_gpu(driver):
    assert engine.gpu_here() == "NVIDIA A, 8.9"
    assert doctor.gpu() == {"available": True, "detail": "NVIDIA A, 8.9, 81920 MiB", "fix": ""}


@pytest.mark.parametrize(("changes", "ordinal", "message"), [
    ({"count": 0}, 0, "no NVIDIA GPU"), ({"count": 1}, 1, "CUDA shows 1 GPUs, number 1 is not among them"),
    ({"started": 35}, 0, "CUDA driver version is insufficient"), ({"started": 3}, 0, "cuInit answered 3"),
])
def test_what_the_driver_refuses_is_said_in_its_words(driver, changes, ordinal, message):
    for name, value in changes.items():
        setattr(driver, name, value)
    with pytest.raises(UnavailableError, match=message) as caught:
        nvidia.find_gpu(ordinal)
    assert caught.value.exit_code == 4 and "CUDA_VISIBLE_DEVICES" in caught.value.fix


def test_without_a_driver_there_is_none(monkeypatch):
    def missing(name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvidia.gpu_or_none() is None and engine.gpu_here() == ""
    assert not doctor.gpu()["available"] and doctor.gpu()["fix"]
