"""The checks of `make gpu`: first CUDA by the very calls that sessions make, then each library that is there."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20
PYTEST_SECONDS = 240


class Unverified(Exception):
    """A check cannot run here; says why."""


def need(module: str) -> Any:
    """A module, or the reason that a check cannot run."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that is there may fail to load in its own way
        raise Unverified(f"{module} does not load here: {type(error).__name__}: {error}") from error


def gpu() -> str:
    """The driver shows a GPU."""
    need("numpy")
    found = need("runtimes.system.nvidia")
    errors = need("runtimes.errors")
    try:
        here = found.find_gpu()
    except errors.UnavailableError as error:
        raise Unverified(f"{error.what} ({error.fix})") from error
    return f"{here}, {here.memory_bytes // MEBIBYTE} MiB"


def device() -> Any:
    """An open `CudaDevice`."""
    gpu()
    need("cuda.bindings.runtime")
    return need("runtimes.backends.tensorrt.cuda_device").CudaDevice()


def memory() -> str:
    """What is uploaded comes back, at 256-byte alignment, and what is freed is free again."""
    np, opened = need("numpy"), device()
    runtime = need("cuda.bindings.runtime")
    try:
        sent = np.random.default_rng(0).integers(0, 255, 3 * MEBIBYTE + 5, np.uint8)
        got = np.zeros_like(sent)
        address = opened.allocate(sent.nbytes)
        assert address % 256 == 0, address
        opened.upload(address, sent)
        opened.download(got, address)
        opened.synchronize()
        assert (sent == got).all()
        opened.free(address)
        before = runtime.cudaMemGetInfo()[1]
        block = opened.allocate(512 * MEBIBYTE)
        during = runtime.cudaMemGetInfo()[1]
        opened.free(block)
        after = runtime.cudaMemGetInfo()[1]
        assert before - during >= 512 * MEBIBYTE and before - after < 64 * MEBIBYTE, (before, during, after)
    finally:
        opened.close()
    return f"{sent.nbytes} bytes there and back; 512 MiB taken and given back"


def out_of_memory() -> str:
    """More than the GPU has is our OutOfMemoryError, and the device is as good as before."""
    errors, opened = need("runtimes.errors"), device()
    here = need("runtimes.system.nvidia").find_gpu()
    try:
        try:
            opened.allocate(2 * here.memory_bytes)
        except errors.OutOfMemoryError as error:
            said = str(error)
        else:
            raise AssertionError("twice the GPU's memory was allocated")
        opened.free(opened.allocate(MEBIBYTE))
    finally:
        opened.close()
    return said


def graphs() -> str:
    """A captured copy is replayed on what the memory holds then, and a capture that fails is given up cleanly."""
    np, opened = need("numpy"), device()
    runtime, errors = need("cuda.bindings.runtime"), need("runtimes.errors")
    try:
        source, target = opened.allocate(1024), opened.allocate(1024)
        opened.begin_capture()
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        assert runtime.cudaMemcpyAsync(target, source, 1024, kind, opened.stream)[0] == 0
        recorded = opened.end_capture()
        for value in (1, 2):
            sent, got = np.full(1024, value, np.uint8), np.zeros(1024, np.uint8)
            opened.upload(source, sent)
            opened.launch(recorded)
            opened.download(got, target)
            opened.synchronize()
            assert (got == value).all(), got
        opened.release(recorded)
        opened.begin_capture()
        try:
            opened.synchronize()  # what weight streaming does: not permitted while capturing
        except errors.DeployError as error:
            said = str(error)
        else:
            raise AssertionError("a synchronization was captured")
        opened.abandon_capture()
        opened.synchronize()
    finally:
        opened.close()
    return f"a copy captured and replayed twice; a capture given up after: {said}"


def close() -> str:
    """`close` gives everything back, a second one does nothing, and another device can be opened."""
    runtime = need("cuda.bindings.runtime")
    first = device()
    before = runtime.cudaMemGetInfo()[1]
    first.allocate(512 * MEBIBYTE)
    first.begin_capture()
    first.end_capture()
    first.close()
    first.close()
    after = runtime.cudaMemGetInfo()[1]
    assert before - after < 64 * MEBIBYTE, (before, after)
    device().close()
    return "512 MiB, a graph and the stream given back; closed twice"


def threads() -> str:
    """A device that one thread opened serves another."""
    np, opened = need("numpy"), device()
    got = np.zeros(256, np.uint8)
    problems: list[BaseException] = []

    def work() -> None:
        try:
            opened.activate()
            address = opened.allocate(256)
            opened.upload(address, np.full(256, 7, np.uint8))
            opened.download(got, address)
            opened.synchronize()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    opened.close()
    if problems:
        raise problems[0]
    assert (got == 7).all()
    return "allocated, copied and waited for in a second thread"


def engine(builder: str) -> str:
    """An engine built here runs through `TensorRtSession`, and its CUDA graphs answer as its plain calls do."""
    gpu()
    for module in ("onnx", "onnx_ir", {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[builder]):
        need(module)
    need("cuda.bindings.runtime")
    np, rt = need("numpy"), need("tests.gpu.engines")
    capability = need("runtimes.system.nvidia").find_gpu().capability
    if builder == "tensorrt-rtx" and capability in ((9, 0), (10, 0)):
        raise Unverified(f"TensorRT for RTX has no code for SM{capability[0]}{capability[1]}")
    with tempfile.TemporaryDirectory() as folder:
        session = rt.affine_session(Path(folder), builder)
        with session:
            for rows in (1, 2, 2, 2, 2, 8, 8, 8, 1):
                x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
                np.testing.assert_allclose(session.run({"x": x})["y"], x @ rt.W + rt.B, rtol=1e-4, atol=1e-4)
            recorded = session.not_recorded
        session.close()
    gc.collect()
    return f"9 calls at 3 sizes; {f'not recorded: {recorded}' if recorded else 'recorded as CUDA graphs'}"


def onnxruntime(name: str) -> str:
    """A graph runs on the provider through `OrtSession`, in float32 and, on CUDA, in float16."""
    gpu()
    need("onnx")
    ort = need("onnxruntime")
    np, rt = need("numpy"), need("tests.gpu.engines")
    providers = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    if providers[name] not in ort.get_available_providers():
        raise Unverified(f"onnxruntime {ort.__version__} here has no {providers[name]} "
                         f"(only {', '.join(ort.get_available_providers())})")
    with tempfile.TemporaryDirectory() as folder, rt.ort_session(Path(folder), name) as session:
        for rows in (1, 2, 8, 2):
            x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
            np.testing.assert_allclose(session.run({"x": x})["y"], x @ rt.W + rt.B, rtol=1e-4, atol=1e-4)
    return f"4 calls at 3 sizes on {providers[name]}, onnxruntime {ort.__version__}"


def pytest_marked() -> str:
    """The tests marked `gpu`, where pytest and what they import are there."""
    gpu()
    for module in ("pytest", "onnx", "onnxruntime", "tokenizers", "cuda.bindings.runtime"):
        need(module)
    if not any(importlib.util.find_spec(module) for module in ("tensorrt", "tensorrt_rtx")):
        raise Unverified("neither tensorrt nor tensorrt_rtx is installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/runtimes"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PYTEST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done after {PYTEST_SECONDS} s") from error
    last = (result.stdout.strip().splitlines() or ["no output"])[-1]
    if result.returncode:
        raise AssertionError(f"{last}\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    return last


GPU = "GPU"  # the check without which no other runs
CUDA_CHECKS: dict[str, Callable[[], str]] = {
    GPU: gpu, "CUDA memory": memory, "CUDA out of memory": out_of_memory, "CUDA graphs": graphs,
    "CUDA close": close, "CUDA threads": threads,
}
CHECKS: dict[str, Callable[[], str]] = {
    **CUDA_CHECKS,
    "TensorRT": lambda: engine("tensorrt"),
    "TensorRT for RTX": lambda: engine("tensorrt-rtx"),
    "ONNX Runtime on CUDA": lambda: onnxruntime("cuda"),
    "ONNX Runtime on TensorRT": lambda: onnxruntime("tensorrt"),
    "pytest -m gpu": pytest_marked,
}
