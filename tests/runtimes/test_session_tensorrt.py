"""Engines behind the Session protocol, on a GPU of numpy; the `gpu` tests run a real one where there is a GPU."""

from __future__ import annotations

import dataclasses
import threading
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtimes import session_tensorrt
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from runtimes.session import SessionOptions
from runtimes.session_tensorrt import TensorRtSession
from runtimes.tensorrt_device import CudaDevice
from runtimes.tensorrt_plan import GRAPHS_KEPT
from tests.runtimes.fake_gpu import B, Diagnostics, Engine, FakeDevice, Validity, W, module
from tests.runtimes.fakes import AFFINE, affine_model, write_bundle

GPU = SessionOptions("cuda")
X = np.arange(8, dtype=np.float32).reshape(2, 4)
PROFILES = [{"x": [[1, 4], [1, 4], [2, 4]]}, {"x": [[2, 4], [8, 4], [8, 4]]}]
LIMITS = [(1, 2), (2, 8)]
HAS_GPU = Path("/proc/driver/nvidia/version").exists()


def make_bundle(folder: Path, content: bytes = b"ftrt" + bytes(200), **details: Any) -> Bundle:
    part = dataclasses.replace(AFFINE, format="tensorrt", file="components/affine/engine.trt", details={
        "builder": "tensorrt", "builder_version": "11.4.0", "compute_capabilities": [], "gpu": "NVIDIA Fake, 8.9",
        "profiles": PROFILES, **details})
    file = folder / part.file
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    onnx.save(affine_model(), file.with_name("model.onnx"))
    return write_bundle(folder, {"affine": part})


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(session_tensorrt, "open_device", lambda: device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return device


def use(monkeypatch, trt: Any) -> None:
    monkeypatch.setattr(session_tensorrt, "load_module", lambda builder, where: trt)


@pytest.fixture
def engine(gpu, monkeypatch) -> Engine:
    made = Engine(gpu, LIMITS)
    use(monkeypatch, module(made))
    return made


@pytest.fixture
def session(engine, tmp_path) -> TensorRtSession:
    return TensorRtSession(make_bundle(tmp_path / "b"), "affine", GPU)


def test_outputs_are_right_fresh_and_named(session):
    first = session.run({"x": X})
    np.testing.assert_allclose(first["y"], X @ W + B)
    first["y"][:] = 0
    for rows in (2, 2, 1, 8, 2, 5):
        x = np.full((rows, 4), rows, np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ W + B)


def test_all_buffers_are_one_allocation_made_once(session, gpu):
    for rows in (1, 8, 2):
        session.run({"x": np.ones((rows, 4), np.float32)})
    assert [entry for entry in gpu.log if entry.startswith("allocate")] == ["allocate 512"]


def test_the_second_call_at_a_shape_is_recorded_and_later_ones_replay_it(session, gpu):
    for _ in range(5):
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ W + B)
    work = [entry for entry in gpu.log if entry in ("execute", "capture", "launch")]
    assert work == ["execute", "execute", "capture", "launch", "launch", "launch", "launch"]


def test_profile_and_shapes_are_set_only_where_they_change(session, gpu):
    for rows in (1, 1, 2, 8, 8):
        session.run({"x": np.ones((rows, 4), np.float32)})
    changes = [entry for entry in gpu.log if entry.startswith(("profile", "shape"))]
    assert changes == ["profile 0", "shape 1", "shape 2", "profile 1", "shape 8"]


def test_only_so_many_graphs_are_kept(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(session_tensorrt, "GRAPHS_KEPT", 2)
    use(monkeypatch, module(Engine(gpu, [(1, 8)])))
    session = TensorRtSession(make_bundle(tmp_path / "b", profiles=[{"x": [[1, 4], [1, 4], [8, 4]]}]), "affine", GPU)
    for rows in (1, 2, 3, 4):
        for _ in range(2):
            session.run({"x": np.ones((rows, 4), np.float32)})
    assert gpu.log.count("release") == 2 and GRAPHS_KEPT == 8


def test_threads_may_share_a_session(session):
    wrong: list[int] = []

    def work(number: int) -> None:
        x = np.full((number, 4), number, np.float32)
        for _ in range(30):
            if not np.allclose(session.run({"x": x})["y"], x @ W + B):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 5, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_shapes_that_no_profile_holds_are_refused_before_the_gpu_sees_them(engine, gpu, tmp_path):
    engine.num_optimization_profiles = 1
    session = TensorRtSession(make_bundle(tmp_path / "b", profiles=PROFILES[:1]), "affine", GPU)
    with pytest.raises(InputError, match=r"no profile of the engine holds x 5x4 .*it takes x 1x4 to 2x4"):
        session.run({"x": np.ones((5, 4), np.float32)})
    assert "execute" not in gpu.log


def test_a_failing_engine_says_where_to_look(session, engine):
    engine.fails = True
    with pytest.raises(DeployError, match=r"affine: TensorRT failed \(running\); its log on stderr"):
        session.run({"x": X})


@pytest.mark.parametrize(("details", "kind", "message"), [
    ({"builder_version": "10.9.0"}, UnavailableError, "built by tensorrt 10.9.0, here is 11.4.0"),
    ({"gpu": "NVIDIA H100, 9.0"}, UnavailableError, "NVIDIA Fake is SM89, the engine was built on NVIDIA H100, 9.0"),
    ({"builder": None}, BundleError, "builder is None"),
    ({"profiles": PROFILES[:1]}, BundleError, "2 profiles, the manifest"),
])
def test_an_engine_for_something_else_is_refused_in_one_line(engine, tmp_path, details, kind, message):
    with pytest.raises(kind, match=message):
        TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", GPU)


def test_a_file_that_is_no_engine_is_refused_before_tensorrt_is_loaded(tmp_path):
    with pytest.raises(BundleError, match="not a TensorRT engine"):
        TensorRtSession(make_bundle(tmp_path / "b", content=b"nothing"), "affine", GPU)


def test_an_engine_that_does_not_load_is_said(gpu, monkeypatch, tmp_path):
    use(monkeypatch, module(None))
    with pytest.raises(UnavailableError, match="TensorRT does not load the engine"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", GPU)


def test_too_little_gpu_memory_is_said(engine, gpu, tmp_path):
    gpu.memory = gpu.memory[:300]
    with pytest.raises(UnavailableError, match="the GPU is out of memory"):
        TensorRtSession(make_bundle(tmp_path / "b"), "affine", GPU)


RTX: dict[str, Any] = {"builder": "tensorrt-rtx", "builder_version": "1.7.1.116", "compute_capabilities": ["SM89"]}


def rtx(engine: Engine | None, validity: tuple[Validity, int] = (Validity.VALID, 0), **more: Any) -> Any:
    return module(engine, version="1.7.1.116", validity=validity, **more)


def test_rtx_records_graphs_itself_and_its_kernels_are_kept_on_disk(gpu, monkeypatch, tmp_path):
    engine = Engine(gpu, LIMITS)
    use(monkeypatch, rtx(engine))
    bundle = make_bundle(tmp_path / "b", **RTX)
    for run in range(2):
        session = TensorRtSession(bundle, "affine", GPU)
        for _ in range(3):
            np.testing.assert_allclose(session.run({"x": X})["y"], X @ W + B)
        assert engine.config is not None and engine.config.cuda_graph_strategy == "whole"
        (kept,) = (tmp_path / "xdg" / "ldm-deploy" / "tensorrt-rtx").iterdir()
        assert kept.read_bytes() == b"kernels;" * (run + 1)
    assert "capture" not in gpu.log


@pytest.mark.parametrize(("found", "message"), [
    (Diagnostics.UNSUPPORTED_CC, "no code for this GPU"), (Diagnostics.VERSION_MISMATCH, "another TensorRT version"),
    (Diagnostics(0), "without a reason"),
])
def test_rtxs_own_diagnosis_of_an_engine_is_passed_on(gpu, monkeypatch, tmp_path, found, message):
    use(monkeypatch, rtx(None, (Validity.INVALID, int(found))))
    with pytest.raises(UnavailableError, match=message):
        TensorRtSession(make_bundle(tmp_path / "b", **RTX), "affine", GPU)


def test_a_stripped_engine_gets_its_weights_from_the_graph_beside_it(engine, gpu, monkeypatch, tmp_path):
    refits: list[str] = []
    use(monkeypatch, module(engine, refits=refits))
    details: dict[str, Any] = {"weights": "components/affine/model.onnx", "options": {"stripped": True}}
    TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", GPU)
    assert refits == [str(tmp_path / "b" / "components/affine/model.onnx")]
    use(monkeypatch, module(engine, fits=False))
    with pytest.raises(BundleError, match=r"the weights of model.onnx do not fit the engine"):
        TensorRtSession(make_bundle(tmp_path / "c", **details), "affine", GPU)


def test_weights_stream_within_what_tensorrt_proposes(engine, tmp_path):
    TensorRtSession(make_bundle(tmp_path / "b", options={"weight_streaming": True}), "affine", GPU)
    assert engine.weight_streaming_budget_v2 == 123


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("details", [{}, RTX])
def test_without_package_driver_or_gpu_one_line_says_which(tmp_path, details):
    builder = details.get("builder", "tensorrt")
    if HAS_GPU:
        pytest.skip("this machine has a GPU: the gpu tests run on it")
    if util.find_spec(builder.replace("-", "_")) is not None:
        expected = "no usable NVIDIA driver" if util.find_spec("cuda") else "cuda-bindings is not installed"
    else:
        expected = rf"{builder} is not installed .*ldm-deploy\[{builder}\]"
    with pytest.raises(UnavailableError, match=expected):
        TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", GPU)


def test_cuda_without_a_driver_is_one_line():
    if HAS_GPU and util.find_spec("cuda"):
        assert CudaDevice().capability >= (7, 5)
        return
    with pytest.raises(UnavailableError, match=r"no usable NVIDIA driver: .|cuda-bindings is not installed"):
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
    session = TensorRtSession(write_bundle(bundle.path, {"affine": part}), "affine", GPU)
    for rows in (1, 2, 2, 2, 8, 1):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ W + B, rtol=1e-5)
