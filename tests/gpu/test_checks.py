"""`make gpu` itself: its CUDA checks on the CUDA of numpy, pass and fail; its verdicts and exit codes."""

from __future__ import annotations

import importlib
import sys

import pytest

import runtimes.system.nvidia
from runtimes.backends.tensorrt import cuda_device
from runtimes.errors import UnavailableError
from runtimes.system.nvidia import Gpu
from tests.gpu.__main__ import main
from tests.gpu.checks import CUDA_CHECKS, GPU, Unverified
from tests.runtimes.fake_gpu import FakeCuda

HERE = Gpu("NVIDIA Fake", (8, 9), 4 << 30)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda(HERE.memory_bytes, gpus=[HERE])
    importlib.import_module("cuda.bindings.runtime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr(runtimes.system.nvidia, "find_gpu", fake.find_gpu)
    monkeypatch.setattr(cuda_device, "find_gpu", fake.find_gpu)
    return fake


def test_a_cuda_that_does_as_documented_passes_every_check(cuda, capsys):
    assert main(dict(CUDA_CHECKS)) == 0
    assert "6 passed, 0 failed, 0 unverified" in capsys.readouterr().out
    assert cuda.leaks() == []


@pytest.mark.parametrize(("broken", "failing"), [
    ("cudaFree", "CUDA memory"), ("cudaGraphLaunch", "CUDA graphs"), ("cudaStreamDestroy", ""),
])
def test_a_cuda_that_does_nothing_where_it_should_is_found(cuda, monkeypatch, capsys, broken, failing):
    success = cuda.cudaGetLastError()
    monkeypatch.setattr(cuda, broken, lambda *arguments: success, raising=False)
    code = main(dict(CUDA_CHECKS))
    printed = capsys.readouterr().out
    if failing:
        assert code == 1 and f"{'FAILED':10} {failing}" in printed
    else:
        assert cuda.leaks() == ["stream 7"]


def test_without_a_gpu_nothing_is_tried_and_the_exit_code_is_4(monkeypatch, capsys):
    def missing(ordinal: int = 0) -> None:
        raise UnavailableError("no usable NVIDIA driver or GPU: none", fix="install the driver")

    monkeypatch.setattr(runtimes.system.nvidia, "find_gpu", missing)
    assert main() == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{'UNVERIFIED':10} GPU: because no usable NVIDIA driver or GPU: none (install the driver)"
    assert all("because no GPU answers" in line for line in lines[1:-1]) and "0 passed, 0 failed, 11 unver" in lines[-1]


def test_a_library_that_is_not_there_is_said_and_does_not_hide_a_failure(capsys):
    def wrong() -> str:
        raise AssertionError("2 is not 3")

    def absent() -> str:
        raise Unverified("tensorrt does not load here")

    assert main({GPU: lambda: "fine", "A": absent}) == 0
    assert main({GPU: lambda: "fine", "A": absent, "B": wrong}) == 1
    assert "UNVERIFIED A: because tensorrt does not load here" in capsys.readouterr().out


def test_no_check_starts_after_the_limit(capsys):
    assert main({GPU: lambda: "fine", "A": lambda: "fine"}, limit_seconds=-1) == 4
    assert "because -1 s are over" in capsys.readouterr().out
