"""TensorRT sessions: what is refused when loading, TensorRT for RTX, the fakes against the real bindings, real GPUs.

Header lines are of TensorRT 11.1's include/NvInferRuntime.h (github.com/NVIDIA/TensorRT, 2026-07-07).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import util
from typing import Any

import numpy as np
import pytest

from runtimes.backends.tensorrt.cuda_device import CudaDevice
from runtimes.backends.tensorrt.engine_session import TensorRtSession
from runtimes.errors import BundleError, UnavailableError
from runtimes.system.nvidia import gpu_or_none
from tests.runtimes import fake_engine
from tests.runtimes.engine_bundles import LIMITS, OPTIONS, engine_details, make_bundle, use
from tests.runtimes.fake_engine import B, EngineInvalidityDiagnostics, EngineValidity, ICudaEngine, W, module
from tests.runtimes.fakes import AFFINE, write_bundle


def run(session: TensorRtSession, count: int) -> None:
    x = np.full((count, 4), count, np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ W + B)


@pytest.mark.parametrize(("details", "kind", "message"), [
    ({"builder_version": "10.9.0"}, UnavailableError, "built by tensorrt 10.9.0, here is 11.4.0"),
    ({"gpu": "NVIDIA H100, 9.0"}, UnavailableError, "NVIDIA Fake is SM89, the engine was built on NVIDIA H100, 9.0"),
    ({"builder": "tvm"}, BundleError, "builder is 'tvm'"),
])
def test_an_engine_for_something_else_is_refused_in_one_line(engine, tmp_path, details, kind, message):
    with pytest.raises(kind, match=message):
        TensorRtSession(make_bundle(tmp_path / "b", **details), "affine", OPTIONS)


def test_a_file_that_is_no_engine_is_refused_before_tensorrt_is_loaded(tmp_path):
    with pytest.raises(BundleError, match="not a TensorRT engine"):
        TensorRtSession(make_bundle(tmp_path / "b", content=b"nothing"), "affine", OPTIONS)


def test_an_engine_that_does_not_load_is_said_with_tensorrts_words(cuda, monkeypatch, tmp_path):
    use(monkeypatch, module(None))
    with pytest.raises(UnavailableError, match=r"does not load the engine: .*the plan is not for this runtime"):
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


def test_rtx_records_graphs_itself_and_its_kernels_are_stored_on_disk(cuda, monkeypatch, tmp_path):
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
        (kept,) = (tmp_path / "xdg" / "ldm-deploy" / "tensorrt-rtx").glob("*.rtxcache")
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
    from exporters.tensorrt.engine_builder import build_engine
    from exporters.tensorrt.engine_options import EngineOptions
    from exporters.tensorrt.optimization_profiles import make_profiles

    builder = "tensorrt" if util.find_spec("tensorrt") else "tensorrt-rtx"
    capabilities = ("current",) if builder == "tensorrt-rtx" else ()
    bundle = make_bundle(tmp_path / "b")
    file = bundle.path / "components/affine/engine.trt"
    report = build_engine(file.with_name("model.onnx"), file, make_profiles(AFFINE.inputs, AFFINE.axes),
                          EngineOptions(builder=builder, capabilities=capabilities))
    part = dataclasses.replace(bundle.component("affine"), details=engine_details(**report.to_json(), gpu=""))
    session = TensorRtSession(write_bundle(bundle.path, {"affine": part}), "affine", OPTIONS)
    for rows in (1, 2, 2, 2, 8, 1):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ W + B, rtol=1e-5)
