"""Engines behind the Session protocol, on a CUDA and a TensorRT of numpy that refuse what the real ones refuse.

Header lines are of TensorRT 11.1's include/NvInferRuntime.h (github.com/NVIDIA/TensorRT, 2026-07-07).
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import re
import threading
from importlib import util
from typing import Any

import numpy as np
import onnx
import pytest

from runtimes import session_tensorrt, tensorrt_contexts, tensorrt_device
from runtimes.batching import RowRunner
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, DeployError, InputError, OutOfMemoryError, UnavailableError
from runtimes.gpu import gpu_or_none
from runtimes.session import SessionOptions
from runtimes.session_tensorrt import TensorRtSession
from runtimes.tensorrt_device import CudaDevice
from tests.runtimes import fake_engine
from tests.runtimes.fake_engine import (
    ROW_BYTES,
    B,
    DataType,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ErrorCodeTRT,
    ICudaEngine,
    W,
    module,
)
from tests.runtimes.fake_gpu import ERROR, GPU, FakeCuda
from tests.runtimes.fakes import AFFINE, affine_model, write_bundle

OPTIONS = SessionOptions("cuda")
X = np.arange(8, dtype=np.float32).reshape(2, 4)
PROFILES = [{"x": [[1, 4], [1, 4], [2, 4]]}, {"x": [[2, 4], [8, 4], [8, 4]]}]
LIMITS = [(1, 2), (2, 8)]
IO_BYTES = 512  # x and y at eight rows, each rounded up to 256


def make_bundle(folder, content: bytes = b"ftrt" + bytes(200), **details: Any) -> Bundle:
    part = dataclasses.replace(AFFINE, format="tensorrt", file="components/affine/engine.trt", details={
        "builder": "tensorrt", "builder_version": "11.4.0", "compute_capabilities": [], "gpu": "NVIDIA Fake, 8.9",
        "profiles": PROFILES, **details})
    file = folder / part.file
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    onnx.save(affine_model(), file.with_name("model.onnx"))
    return write_bundle(folder, {"affine": part})


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """The fake runtime; whatever a test does, nothing may stay behind on the GPU."""
    fake = FakeCuda()
    monkeypatch.setattr(tensorrt_device, "load_runtime", lambda: fake)
    monkeypatch.setattr(tensorrt_device, "find_gpu", lambda ordinal=0: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield fake
    gc.collect()
    assert fake.leaks() == []


def use(monkeypatch, trt: Any) -> None:
    monkeypatch.setattr(session_tensorrt, "load_module", lambda builder, where: trt)


@pytest.fixture
def engine(cuda, monkeypatch) -> ICudaEngine:
    made = ICudaEngine(cuda, LIMITS)
    use(monkeypatch, module(made))
    return made


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


def test_only_so_many_graphs_are_kept(cuda, engine, session, monkeypatch):
    monkeypatch.setattr(tensorrt_contexts, "GRAPHS_KEPT", 2)
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
    ((ErrorCodeTRT.FAILED_EXECUTION, "Cask  conv failed"), DeployError, r"TensorRT failed \(running\): Cask conv failed"),
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


def test_every_thread_that_runs_a_session_is_moved_to_its_gpu(engine, cuda, monkeypatch, tmp_path):
    """cuda-bindings, cudaSetDevice: "Sets `device` as the current device for the calling host thread"."""
    cuda.ordinal = 1
    monkeypatch.setattr(session_tensorrt, "open_device", lambda: CudaDevice(1))
    session = TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(session.run({"x": X})["y"]))
    thread.start()
    thread.join()
    np.testing.assert_allclose(results[0], X @ W + B)
    session.close()


# ---- what is refused when loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("details", "kind", "message"), [
    ({"builder_version": "10.9.0"}, UnavailableError, "built by tensorrt 10.9.0, here is 11.4.0"),
    ({"gpu": "NVIDIA H100, 9.0"}, UnavailableError, "NVIDIA Fake is SM89, the engine was built on NVIDIA H100, 9.0"),
    ({"builder": None}, BundleError, "builder is None"),
])
def test_an_engine_for_something_else_is_refused_in_one_line(engine, tmp_path, details, kind, message):
    with pytest.raises(kind, match=message):
        TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", OPTIONS)


def test_a_file_that_is_no_engine_is_refused_before_tensorrt_is_loaded(tmp_path):
    with pytest.raises(BundleError, match="not a TensorRT engine"):
        TensorRtSession(make_bundle(tmp_path / "b", content=b"nothing"), "affine", OPTIONS)


def test_an_engine_that_does_not_load_is_said_with_tensorrts_words(cuda, monkeypatch, tmp_path):
    use(monkeypatch, module(None))
    with pytest.raises(UnavailableError, match=r"TensorRT does not load the engine: .*the plan is not for this runtime"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", OPTIONS)


@pytest.mark.parametrize("compatible", [True, False])
def test_a_version_compatible_engine_may_bring_its_lean_runtime_and_no_other_engine_may_bring_code(
        engine, tmp_path, compatible):
    """`NvInferRuntime.h:2130`, setEngineHostCodeAllowed: "whether the runtime is allowed to deserialize engines with
    host executable code. The default value is false"; kVERSION_COMPATIBLE plans hold the lean runtime (NvInfer.h).
    """
    engine.host_code = True
    bundle = make_bundle(tmp_path / "b", options={"version_compatible": compatible})
    if compatible:
        TensorRtSession(bundle, "affine", OPTIONS).close()
    else:
        with pytest.raises(UnavailableError, match="does not load the engine"):
            TensorRtSession(bundle, "affine", OPTIONS)


def test_a_stripped_engine_gets_its_weights_from_the_graph_beside_it(engine, monkeypatch, tmp_path):
    trt = module(engine)
    use(monkeypatch, trt)
    details: dict[str, Any] = {"weights": "components/affine/model.onnx", "options": {"stripped": True}}
    TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", OPTIONS).close()
    assert trt.Refitter.files == [str(tmp_path / "b" / "components/affine/model.onnx")]
    use(monkeypatch, module(engine, fits=False))
    with pytest.raises(BundleError, match=r"the weights of model.onnx do not fit the engine"):
        TensorRtSession(make_bundle(tmp_path / "c", **details), "affine", OPTIONS)


# ---- TensorRT for RTX ------------------------------------------------------------------------------------------------

RTX: dict[str, Any] = {"builder": "tensorrt-rtx", "builder_version": "1.7.1.116", "compute_capabilities": ["SM89"]}


def rtx(engine: ICudaEngine | None, validity: tuple[EngineValidity, int] = (EngineValidity.VALID, 0)) -> Any:
    return module(engine, version="1.7.1.116", validity=validity)


def test_rtx_records_graphs_itself_and_its_kernels_are_kept_on_disk(cuda, monkeypatch, tmp_path):
    engine = ICudaEngine(cuda, LIMITS)
    use(monkeypatch, rtx(engine))
    bundle = make_bundle(tmp_path / "b", **RTX)
    for number in range(2):
        with TensorRtSession(bundle, "affine", OPTIONS) as session:
            for _ in range(3):
                run(session, 2)
            assert "RTX" in session.not_recorded
        assert engine.config is not None
        assert engine.config.cuda_graph_strategy is fake_engine.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        (kept,) = (tmp_path / "xdg" / "ldm-deploy" / "tensorrt-rtx").iterdir()
        assert kept.read_bytes() == b"kernels;" * (number + 1)
    assert "capture" not in cuda.log


@pytest.mark.parametrize(("found", "message"), [
    (EngineInvalidityDiagnostics.UNSUPPORTED_CC, "no code for this GPU"),
    (EngineInvalidityDiagnostics.VERSION_MISMATCH, "another TensorRT version"),
    (EngineInvalidityDiagnostics(0), "without a reason"),
])
def test_rtxs_own_diagnosis_of_an_engine_is_passed_on(cuda, monkeypatch, tmp_path, found, message):
    use(monkeypatch, rtx(None, (EngineValidity.INVALID, int(found))))
    with pytest.raises(UnavailableError, match=message):
        TensorRtSession(make_bundle(tmp_path / "b", **RTX), "affine", OPTIONS)


# ---- the fakes against the real bindings -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "Runtime",
                                  "Refitter", "OnnxParserRefitter"])
def test_the_fake_has_the_real_bindings_names_and_arguments(name):
    """TensorRT for RTX's bindings stand for `tensorrt`'s: one source, python/src/infer/pyCore.cpp."""
    trt = pytest.importorskip("tensorrt_rtx")
    fake = getattr(fake_engine, name, None) or getattr(module(None, validity=(EngineValidity.VALID, 0)), name)
    ours = {"cuda", "limits", "columns", "types", "refuse", "host_code", "streams_weights", "not_capturable",
            "contexts_left", "fails", "config", "files", "fits"}
    for attribute in {n for n in vars(fake) if not n.startswith("_")} - ours:
        real = getattr(getattr(trt, name), attribute, None)
        assert real is not None, f"{name} has no {attribute}"
        method = vars(fake)[attribute]
        if inspect.isfunction(method) and attribute not in ("create_execution_context", "get_engine_validity"):
            wanted = list(inspect.signature(method).parameters)[1:]
            declared = [re.findall(r"(\w+): ", line)[1:] for line in (real.__doc__ or "").splitlines()
                        if re.match(rf"(\d+\. )?{attribute}\(self", line)]
            assert wanted in declared, f"{name}.{attribute} takes {declared}"


@pytest.mark.parametrize("name", ["EngineValidity", "EngineInvalidityDiagnostics", "CudaGraphStrategy", "TensorIOMode",
                                  "TensorLocation", "ExecutionContextAllocationStrategy", "DataType", "ErrorCodeTRT"])
def test_members_of_the_fakes_enumerations_are_the_real_ones(name):
    trt = pytest.importorskip("tensorrt_rtx")
    assert set(getattr(fake_engine, name).__members__) <= set(getattr(trt, name).__members__)


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("details", [{}, RTX])
def test_without_package_driver_or_gpu_one_line_says_which(tmp_path, details):
    builder = details.get("builder", "tensorrt")
    if gpu_or_none() is not None:
        pytest.skip("this machine has a GPU: the gpu tests run on it")
    if util.find_spec(builder.replace("-", "_")) is not None:
        expected = "no usable NVIDIA driver"
    else:
        expected = rf"{builder} is not installed .*ldm-deploy\[{builder}\]"
    with pytest.raises(UnavailableError, match=expected):
        TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", OPTIONS)


def test_cuda_without_a_driver_is_one_line():
    if gpu_or_none() is not None:
        pytest.skip("this machine has a GPU: the gpu tests run on it")
    with pytest.raises(UnavailableError, match=r"no usable NVIDIA driver or GPU: ."):
        CudaDevice()


@pytest.mark.gpu
def test_an_engine_on_a_real_gpu_computes_the_same(tmp_path):
    from exporters.tensorrt_from_onnx import build_engine
    from exporters.tensorrt_options import EngineOptions, make_profiles

    builder = "tensorrt" if util.find_spec("tensorrt") else "tensorrt-rtx"
    capabilities = ("current",) if builder == "tensorrt-rtx" else ()
    bundle = make_bundle(tmp_path / "b")
    file = bundle.path / "components/affine/engine.trt"
    report = build_engine(file.with_name("model.onnx"), file, make_profiles(AFFINE.inputs, AFFINE.axes),
                          EngineOptions(builder=builder, capabilities=capabilities))
    part = dataclasses.replace(bundle.component("affine"), details={**report.to_json(), "gpu": ""})
    session = TensorRtSession(write_bundle(bundle.path, {"affine": part}), "affine", OPTIONS)
    for rows in (1, 2, 2, 2, 8, 1):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ W + B, rtol=1e-5)
