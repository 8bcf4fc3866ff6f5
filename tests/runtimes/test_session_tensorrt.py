"""Engines behind the Session protocol, on a CUDA and a TensorRT of numpy that refuse what the real ones refuse.

Header lines are of TensorRT 11.1's include/NvInferRuntime.h (github.com/NVIDIA/TensorRT, 2026-07-07).
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from runtimes.backends.batching import RowRunner
from runtimes.backends.session import SessionOptions
from runtimes.backends.tensorrt import contexts
from runtimes.backends.tensorrt.engine_session import TensorRtSession
from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.system.device import Device
from runtimes.system.nvidia import Gpu
from tests.runtimes.engine_bundles import LIMITS, OPTIONS, PROFILES, make_bundle, use
from tests.runtimes.fake_engine import ROW_BYTES, B, DataType, ErrorCodeTRT, ICudaEngine, W, module
from tests.runtimes.fake_gpu import ERROR, FakeCuda

X = np.arange(8, dtype=np.float32).reshape(2, 4)
IO_BYTES = 512  # x and y at eight rows, each rounded up to 256


@pytest.fixture
def session(engine, tmp_path):
    opened = TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    yield opened
    opened.close()


def rows_of(count: int) -> np.ndarray:
    return np.full((count, 4), count, np.float32)


def run(session: TensorRtSession, count: int) -> None:
    np.testing.assert_allclose(session.run({"x": rows_of(count)})["y"], rows_of(count) @ W + B)


def work(cuda: FakeCuda) -> list[str]:
    return [entry for entry in cuda.log if entry in ("execute", "capture", "launch", "release")]


def test_outputs_are_right_fresh_and_named(session):
    first = session.run({"x": X})
    np.testing.assert_allclose(first["y"], X @ W + B)
    first["y"][:] = 0
    for count in (2, 2, 1, 8, 2, 5):
        run(session, count)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_shapes_that_come_again_are_enqueued_once_in_their_own_context_then_captured_then_replayed(session, cuda):
    """`sampleInference.cpp`, createEnqueueFunction: "Avoid capturing initialization calls by executing the enqueue
    function at least once before starting CUDA graph capture"; `NvInferRuntime.h:502`: deferred work runs at the next
    enqueueV3 after profile, address or shape were changed.
    """
    for _ in range(5):
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ W + B)
    assert work(cuda) == ["execute", "execute", "execute", "capture", "launch", "launch", "launch"]
    assert session.not_recorded == ""


def test_each_captured_graph_has_a_context_that_is_never_changed_again(session, engine, cuda):
    """A graph belongs to "that particular input size and context state" (TensorRT documentation, CUDA Graphs): the
    fake raises where a graph is replayed after its context was changed.
    """
    for _ in range(4):
        for count in (1, 2, 8, 3):
            run(session, count)
    assert cuda.log.count("capture") == 4 and engine.contexts_left == 99 - 5


def test_only_so_many_graphs_are_stored(cuda, engine, session, monkeypatch):
    monkeypatch.setattr(contexts, "MOST_GRAPHS", 2)
    for count in (8, 1, 2, 3, 4):
        for _ in range(3):
            run(session, count)
    assert cuda.log.count("release") == 3
    run(session, 8)


def test_a_capture_that_fails_leaves_plain_enqueues_and_its_cause(session, engine, cuda):
    """`sampleInference.cpp`: "The built TRT engine may contain operations that are not permitted under CUDA graph
    capture mode ... the enqueue call may return false"; the sample then runs without a graph.
    """
    engine.not_capturable = True
    for _ in range(5):
        run(session, 2)
    assert "not permitted when stream is capturing" in session.not_recorded
    assert work(cuda) == ["execute"] * 5
    assert cuda.last_error == ERROR.cudaSuccess, "an error of the capture would be reported by the next library"


def test_a_graph_that_cannot_be_instantiated_leaves_plain_enqueues_and_its_cause(session, cuda):
    cuda.fail_instantiate = True
    for _ in range(4):
        run(session, 2)
    assert "invalid argument" in session.not_recorded and "launch" not in cuda.log


def test_a_context_too_many_leaves_plain_enqueues_and_its_cause(session, engine):
    engine.contexts_left = 0
    for _ in range(4):
        run(session, 2)
    assert "out of memory (creating an execution context)" in session.not_recorded


def test_streamed_weights_are_never_captured(cuda, monkeypatch, tmp_path):
    """`NvInferRuntime.h:4642`: "If the Engine is streaming weights, enqueueV3 will become synchronous, and the graph
    will not be capturable."
    """
    engine = ICudaEngine(cuda, LIMITS)
    engine.streams_weights = True
    use(monkeypatch, module(engine))
    session = TensorRtSession(make_bundle(tmp_path / "b", options={"weight_streaming": True}), "affine", OPTIONS)
    assert engine.weight_streaming_budget_v2 == 123
    for _ in range(3):
        run(session, 2)
    assert work(cuda) == ["execute"] * 3 and "streamed" in session.not_recorded
    session.close()


def test_a_budget_that_the_engine_does_not_take_is_said(engine, tmp_path):
    """`NvInferRuntime.h:3660`: "kWEIGHT_STREAMING must be set during engine building"; the Python property drops the
    setter's answer (pyCore.cpp:1528).
    """
    with pytest.raises(DeployError, match="weight streaming budget of 123 bytes"):
        TensorRtSession(make_bundle(tmp_path / "b", options={"weight_streaming": True}), "affine", OPTIONS)


# ---- profiles, shapes, bounds ----------------------------------------------------------------------------------------


def test_profile_and_shapes_are_set_only_where_they_change(session, cuda):
    for count in (1, 2, 8, 5):
        run(session, count)
    changes = [entry for entry in cuda.log if entry.startswith(("profile", "shape"))]
    assert changes == ["profile 0", "shape 1", "shape 2", "profile 1", "shape 8", "shape 5"]


def test_a_profile_that_cannot_be_set_is_our_error(session, engine):
    """`pyCore.cpp:336`: set_optimization_profile_async raises RuntimeError, it never returns False."""
    run(session, 1)
    engine.num_optimization_profiles = 1
    with pytest.raises(DeployError, match=r"failed \(profile 1\): Error in set optimization profile async"):
        session.run({"x": rows_of(8)})
    run(session, 1)


def test_shapes_that_no_profile_holds_are_refused_before_the_gpu_sees_them(cuda, monkeypatch, tmp_path):
    use(monkeypatch, module(ICudaEngine(cuda, LIMITS[:1])))
    session = TensorRtSession(make_bundle(tmp_path / "b", profiles=PROFILES[:1]), "affine", OPTIONS)
    with pytest.raises(InputError, match=r"no profile of the engine holds x 5x4 .*it takes x 1x4 to 2x4"):
        session.run({"x": rows_of(5)})
    assert "execute" not in cuda.log
    session.close()


def test_an_engine_that_would_write_past_its_buffer_is_stopped_before_it_does(cuda, monkeypatch, tmp_path):
    """`NvInferRuntime.h:4365`: "The pointer must point to a device buffer of sufficient size"; nothing checks it."""
    use(monkeypatch, module(ICudaEngine(cuda, LIMITS, columns=300)))
    session = TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    with pytest.raises(BundleError, match=r"y would have shape \(2, 300\), more than the manifest's axes allow"):
        session.run({"x": X})
    assert "execute" not in cuda.log
    session.close()


@pytest.mark.parametrize(("change", "message"), [
    ({"types": {"x": DataType.HALF, "y": DataType.FLOAT}},
     "x is input of float16 in the engine, input of float32 in the manifest"),
    ({"limits": [(1, 2), (2, 7)]}, "profile 1 of the engine takes x 2x4 to 7x4, the manifest 2x4 to 8x4"),
    ({"num_optimization_profiles": 1}, "the engine has 1 profiles, the manifest 2"),
    ({"num_io_tensors": 1}, r"the engine has \['x'\], the manifest \['x', 'y'\]"),
])
def test_an_engine_that_is_not_the_manifests_is_refused_before_it_runs(engine, tmp_path, change, message):
    for name, value in change.items():
        setattr(engine, name, value)
    with pytest.raises(BundleError, match=message):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_are_one_allocation_and_activations_grow_to_what_the_shapes_need(session, cuda):
    """`NvInferRuntime.h:4505`, updateDeviceMemorySizeForShapes: users allocate "based on the size returned"."""
    for count in (1, 8, 2, 8):
        run(session, count)
    allocated = [entry for entry in cuda.log if entry.startswith("allocate")]
    assert allocated == [f"allocate {IO_BYTES}", f"allocate {ROW_BYTES}", f"allocate {8 * ROW_BYTES}"]


def test_graphs_that_hold_the_address_of_memory_that_was_freed_are_dropped(session, cuda):
    for count in (1, 1, 1, 8, 1, 1, 1, 1):
        run(session, count)
    assert cuda.log.count("capture") == 2 and cuda.log.count("release") == 1


def test_out_of_memory_starts_the_halving_of_the_batch(session, cuda):
    cuda.memory_bytes = IO_BYTES + 2 * ROW_BYTES
    runner = RowRunner(session, 8)
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    np.testing.assert_allclose(runner.run({"x": x})["y"], x @ W + B)
    np.testing.assert_allclose(runner.run({"x": x})["y"], x @ W + B)
    cuda.memory_bytes = IO_BYTES
    session._loaded.contexts._grow(0)
    with pytest.raises(OutOfMemoryError, match="the GPU is out of memory"):
        RowRunner(session, 8).run({"x": x})


@pytest.mark.parametrize(("recorded", "kind", "message"), [
    ((ErrorCodeTRT.FAILED_ALLOCATION, "tried to allocate 3 GB"), OutOfMemoryError, r"out of memory \(running\): tried"),
    ((ErrorCodeTRT.FAILED_EXECUTION, "Cuda Runtime (out of memory)"), OutOfMemoryError, "out of memory"),
    ((ErrorCodeTRT.FAILED_EXECUTION, "Cask  conv failed"), DeployError, r"failed \(running\): Cask conv failed"),
])
def test_what_tensorrt_recorded_decides_the_error(session, engine, recorded, kind, message):
    """`NvInferRuntimeBase.h:348`, kFAILED_ALLOCATION: "An error occurred when performing an allocation of memory"."""
    engine.fails = recorded
    with pytest.raises(DeployError, match=message) as caught:
        session.run({"x": X})
    assert type(caught.value) is kind
    engine.fails = None
    run(session, 2)


@pytest.mark.parametrize("bytes_there", [100, IO_BYTES - 1])
def test_too_little_gpu_memory_is_said_and_nothing_stays_behind(engine, cuda, tmp_path, bytes_there):
    cuda.memory_bytes = bytes_there
    with pytest.raises(OutOfMemoryError, match="the GPU is out of memory"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    assert cuda.leaks() == []


def test_a_context_that_does_not_fit_is_out_of_memory_and_nothing_stays_behind(engine, cuda, tmp_path):
    engine.contexts_left = 0
    with pytest.raises(OutOfMemoryError, match="Requested amount of GPU memory"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    assert cuda.leaks() == []


def test_close_gives_everything_back_once_and_a_closed_session_says_so(session, cuda):
    for _ in range(4):
        run(session, 2)
    assert len(cuda.leaks()) == 4  # buffers, activations, stream, graph
    session.close()
    assert cuda.leaks() == []
    session.close()
    with pytest.raises(DeployError, match="the session is closed"):
        session.run({"x": X})


def test_a_session_is_a_context_manager(engine, cuda, tmp_path):
    with TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS) as session:
        run(session, 2)
    assert cuda.leaks() == []


def test_a_session_that_nobody_holds_gives_everything_back(engine, cuda, tmp_path):
    session = TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    run(session, 2)
    del session
    gc.collect()
    assert cuda.leaks() == []


# ---- threads and devices ---------------------------------------------------------------------------------------------


def test_threads_may_share_a_session(session):
    wrong: list[int] = []

    def work(number: int) -> None:
        x = rows_of(number)
        for _ in range(30):
            if not np.allclose(session.run({"x": x})["y"], x @ W + B):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 5, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SECOND = SessionOptions(Device("cuda", 1))


def test_every_thread_that_runs_a_session_is_moved_to_its_gpu(engine, cuda, tmp_path):
    """cuda-bindings, cudaSetDevice: "Sets `device` as the current device for the calling host thread"."""
    cuda.ordinal = 1
    session = TensorRtSession(make_bundle(tmp_path / "b"), "affine", SECOND)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(session.run({"x": X})["y"]))
    thread.start()
    thread.join()
    np.testing.assert_allclose(results[0], X @ W + B)
    thread = threading.Thread(target=session.close)
    thread.start()
    thread.join()
    assert cuda.leaks() == []


def test_an_engine_is_loaded_recorded_and_released_on_the_gpu_that_was_asked_for(engine, cuda, tmp_path):
    """The fake refuses to allocate, copy, load, run and free while another GPU is the thread's current one."""
    cuda.ordinal = 1
    with TensorRtSession(make_bundle(tmp_path / "b"), "affine", SECOND) as session:
        for _ in range(4):
            run(session, 2)
            cuda.cudaSetDevice(0)  # by another library in this thread
    assert cuda.log.count("launch") == 2 and cuda.leaks() == []


def test_an_engine_for_the_second_gpu_is_compared_with_the_second_gpu(engine, cuda, tmp_path):
    cuda.ordinal, cuda.gpus = 1, [cuda.gpus[0], Gpu("NVIDIA Other", (9, 0), 1 << 20)]
    with pytest.raises(UnavailableError, match=r"NVIDIA Other is SM90, the engine was built on NVIDIA Fake, 8.9"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", SECOND)
    assert cuda.leaks() == []


def test_a_gpu_that_is_not_there_is_named_before_anything_is_allocated(engine, cuda, tmp_path):
    with pytest.raises(UnavailableError, match="CUDA shows 2 GPUs, number 2 is not among them"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", SessionOptions(Device("tensorrt", 2)))
    assert cuda.log == []


@pytest.mark.parametrize("device", ["gpu", "npu", "auto", "tensorrt-rtx:1"])
def test_a_device_that_engines_do_not_run_on_is_refused(engine, cuda, tmp_path, device):
    with pytest.raises(InputError, match=r"an engine of tensorrt does not run on .* use tensorrt or cuda"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", SessionOptions(Device.parse(device)))
