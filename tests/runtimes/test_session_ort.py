"""ONNX Runtime behind the Session protocol: results, checks, devices, and its errors as ours."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from runtimes import session_ort
from runtimes.bundle import Bundle
from runtimes.errors import BundleError, InputError, UnavailableError
from runtimes.session import SessionOptions, open_session
from runtimes.session_ort import OrtSession, profile_shapes, provider_options, session_options
from runtimes.tensors import Axis, ShapeRange, TensorSpec
from tests.runtimes.fakes import AFFINE, affine_bundle, affine_model, component, components, graph
from tests.runtimes.hub_cache import as_hub_snapshot

CPU = SessionOptions(threads=1)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
Y = X @ np.arange(12, dtype=np.float32).reshape(4, 3) + np.array([1, 2, 3], np.float32)


@pytest.fixture
def session(tmp_path) -> OrtSession:
    opened = open_session(affine_bundle(tmp_path / "b"), "affine", CPU)
    assert isinstance(opened, OrtSession)
    return opened


def test_outputs_are_right_fresh_and_named(session):
    first = session.run({"x": X})
    np.testing.assert_allclose(first["y"], Y, rtol=1e-6)
    first["y"][:] = 0  # the caller owns it
    np.testing.assert_allclose(session.run({"x": X})["y"], Y, rtol=1e-6)


@pytest.mark.parametrize(("feeds", "message"), [
    ({"z": X}, r"missing \['x'\], unknown \['z'\]"),
    ({"x": X.astype(np.float64)}, "x is float64, expected float32"),
    ({"x": X[0]}, "has shape"),
    ({"x": X[:, :3]}, "has shape"),
    ({"x": np.zeros((9, 4), np.float32)}, "batch=9 is outside"),
])
def test_feeds_that_do_not_fit_are_named(session, feeds, message):
    with pytest.raises(InputError, match=message):
        session.run(feeds)


@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_a_device_that_is_missing_is_said_and_never_replaced(tmp_path, device):
    if session_ort.PROVIDERS[device] in ort.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(UnavailableError) as caught:
        open_session(affine_bundle(tmp_path / "b"), "affine", SessionOptions(device))
    error = caught.value
    assert session_ort.PROVIDERS[device] in error.what and device in error.where and error.fix
    assert error.exit_code == 4


def test_a_provider_that_fails_to_start_is_not_a_silent_fall_back(tmp_path, monkeypatch):
    """ORT itself warns and goes on with the CPU."""
    monkeypatch.setitem(session_ort.PROVIDERS, "cuda", "AzureExecutionProvider")
    bundle = affine_bundle(tmp_path / "b")
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="would have used the CPU"):
        OrtSession(bundle, "affine", SessionOptions("cuda"))


def test_an_unknown_device_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        open_session(affine_bundle(tmp_path / "b"), "affine", SessionOptions("gpu"))


@pytest.mark.parametrize("content", [b"", b"not a graph", affine_model().SerializeToString()[:150]])
def test_a_corrupt_graph_is_a_broken_bundle(tmp_path, content):
    with pytest.raises(BundleError) as caught:
        open_session(affine_bundle(tmp_path / "b", content), "affine", CPU)
    assert caught.value.where == "affine" and "\n" not in str(caught.value)


def test_an_operator_without_kernel_is_a_broken_bundle(tmp_path):
    model = affine_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BundleError, match="NoSuchOperator"):
        open_session(affine_bundle(tmp_path / "b", model.SerializeToString()), "affine", CPU)


def test_a_graph_whose_names_are_not_the_manifests_is_refused(tmp_path):
    part = dataclasses.replace(AFFINE, outputs=(TensorSpec("out", "float32", ("batch", 3)),))
    with pytest.raises(BundleError, match="outputs"):
        open_session(affine_bundle(tmp_path / "b", part=part), "affine", CPU)


def test_a_graph_that_contradicts_the_manifest_at_run_time_is_bad_input(tmp_path):
    part = dataclasses.replace(AFFINE, inputs=(TensorSpec("x", "float32", ("batch", "width")),))
    with pytest.raises(InputError, match="does not take these inputs"):
        open_session(affine_bundle(tmp_path / "b", part=part), "affine", CPU).run({"x": np.zeros((2, 5), np.float32)})


def test_out_of_memory_is_something_the_machine_lacks(tmp_path):
    wide = graph([("n", TensorProto.INT64, [1])], [("y", TensorProto.FLOAT, ["m"])],
                 [helper.make_node("ConstantOfShape", ["n"], ["y"])])
    part = component((TensorSpec("n", "int64", (1,)),), (TensorSpec("y", "float32", ("m",)),), {},
                     file="components/affine/model.onnx")
    session = open_session(affine_bundle(tmp_path / "b", wide, part), "affine", CPU)
    with pytest.raises(UnavailableError, match="out of memory"):
        session.run({"n": np.array([1 << 50])})


def test_external_data_is_read_in_place(tmp_path):
    bundle = affine_bundle(tmp_path / "b", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert "components/affine/model.onnx.data" in bundle.component("affine").files
    np.testing.assert_allclose(open_session(bundle, "affine", CPU).run({"x": X})["y"], Y, rtol=1e-6)


def test_external_data_is_read_through_the_links_of_the_hubs_cache(tmp_path):
    """ONNX Runtime demands that external data stays in the model's folder: allowed is that of the linked graph, too."""
    bundle = affine_bundle(tmp_path / "b", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    linked = Bundle.open(as_hub_snapshot(bundle.path, tmp_path / "models--acme--affine"))
    np.testing.assert_allclose(open_session(linked, "affine", CPU).run({"x": X})["y"], Y, rtol=1e-6)


@pytest.mark.parametrize(("details", "level"), [
    ({}, ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ({"ort_graph_optimization": "all"}, ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    ({"ort_graph_optimization": "basic"}, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    ({"ort_graph_optimization": "disabled"}, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
])
def test_the_manifest_says_how_much_is_left_to_optimize(details, level):
    options = session_options(dataclasses.replace(AFFINE, details=details), SessionOptions(threads=3))
    assert options.graph_optimization_level == level and options.intra_op_num_threads == 3


def test_an_unknown_optimization_level_is_refused():
    with pytest.raises(BundleError, match="ort_graph_optimization is 'max'"):
        session_options(dataclasses.replace(AFFINE, details={"ort_graph_optimization": "max"}), CPU)


def test_bound_outputs_reuse_a_threads_buffer_and_stay_the_callers(tmp_path):
    """The device path, run on the CPU's memory: the same code binds CUDA buffers."""
    bundle = affine_bundle(tmp_path / "b")
    session = OrtSession(bundle, "affine", CPU)
    session._bound = session_ort._BoundRunner(session._session, AFFINE, "cpu")
    first = session.run({"x": X})["y"]
    buffer = session._bound._local.buffers["y"][1]
    second = session.run({"x": X + 1})["y"]
    assert session._bound._local.buffers["y"][1] is buffer
    np.testing.assert_allclose(first, Y, rtol=1e-6)
    assert not np.array_equal(first, second)
    assert session.run({"x": X[:1]})["y"].shape == (1, 3)
    assert session._bound._local.buffers["y"][1] is not buffer


def test_bound_outputs_whose_shape_is_not_known_come_back_as_well(tmp_path):
    part = dataclasses.replace(AFFINE, outputs=(TensorSpec("y", "float32", ("rows", 3)),))
    session = OrtSession(affine_bundle(tmp_path / "b", part=part), "affine", CPU)
    session._bound = session_ort._BoundRunner(session._session, part, "cpu")
    np.testing.assert_allclose(session.run({"x": X})["y"], Y, rtol=1e-6)


def test_threads_share_a_session(session):
    inputs = [np.full((1 + i % 3, 4), i, np.float32) for i in range(40)]
    expected = [session.run({"x": x})["y"] for x in inputs]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i, x in enumerate(inputs) if not np.array_equal(session.run({"x": x})["y"], expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tensorrt_profiles_come_from_the_axes():
    shapes = profile_shapes(components()["unet"])
    assert shapes == {
        "min": "sample:1x2x4x4,timestep:1,encoder_hidden_states:1x5x3",
        "opt": "sample:1x2x4x4,timestep:1,encoder_hidden_states:1x5x3",
        "max": "sample:8x2x16x16,timestep:8,encoder_hidden_states:8x5x3",
    }
    assert profile_shapes(dataclasses.replace(AFFINE, axes={})) == {}


def test_provider_options_keep_fp32_exact_and_caches_outside_the_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert provider_options("cuda", AFFINE)["use_tf32"] == "0"
    assert provider_options("cuda", dataclasses.replace(AFFINE, precision="fp16"))["use_tf32"] == "1"
    tensorrt = provider_options("tensorrt", AFFINE)
    assert tensorrt["trt_fp16_enable"] == "0" and tensorrt["trt_engine_cache_path"].startswith(str(tmp_path))
    assert provider_options("tensorrt-rtx", AFFINE)["nv_profile_max_shapes"] == "x:8x4"
    assert provider_options("cpu", AFFINE) == {}


def test_a_format_without_runtime_is_named(tmp_path):
    part = dataclasses.replace(AFFINE, format="safetensors")
    with pytest.raises(BundleError, match="no runtime runs the format 'safetensors'"):
        open_session(affine_bundle(tmp_path / "b", part=part), "affine", CPU)


def test_rank_zero_and_fixed_axes_are_checked():
    part = component((TensorSpec("n", "int64", (2, "k")), TensorSpec("m", "int64", ("k",))), (),
                     {"k": Axis("k", ShapeRange(2, 2, 8), 2)})
    from runtimes.tensors import bind_axes

    assert bind_axes(part.inputs, {"n": np.zeros((2, 4), int), "m": np.zeros(4, int)}, part.axes, "p") == {"k": 4}
    with pytest.raises(InputError, match="another input has 4"):
        bind_axes(part.inputs, {"n": np.zeros((2, 4), int), "m": np.zeros(2, int)}, part.axes, "p")
    with pytest.raises(InputError, match="multiples of 2"):
        bind_axes(part.inputs, {"n": np.zeros((2, 3), int), "m": np.zeros(3, int)}, part.axes, "p")


def test_the_models_of_these_tests_are_valid():
    onnx.checker.check_model(affine_model(), full_check=True)
