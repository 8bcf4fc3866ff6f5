"""ONNX Runtime behind the Session protocol: results, checks, devices, and its errors as ours."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from runtimes.backends import onnxruntime_session
from runtimes.backends.onnxruntime_session import OrtSession, profile_shapes, provider_options, session_options
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.details import Conversion, GraphDetails, SourceDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from runtimes.system.device import Device
from tests.runtimes.fakes import AFFINE, affine_bundle, affine_model, component, components, graph
from tests.runtimes.hub_cache import as_hub_snapshot

CPU = SessionOptions(threads=1)
X = np.arange(8, dtype=np.float32).reshape(2, 4)
Y = X @ np.arange(12, dtype=np.float32).reshape(4, 3) + np.array([1, 2, 3], np.float32)


@pytest.fixture
def session(tmp_path) -> OrtSession:
    opened = Session.open(affine_bundle(tmp_path / "b"), "affine", CPU)
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


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_missing_is_said_and_never_replaced(tmp_path, device):
    if onnxruntime_session.PROVIDERS[device] in ort.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(UnavailableError) as caught:
        Session.open(affine_bundle(tmp_path / "b"), "affine", SessionOptions(Device(device)))
    error = caught.value
    assert onnxruntime_session.PROVIDERS[device] in error.what and device in error.where and error.fix
    assert error.exit_code == 4


def stand_in(monkeypatch) -> SessionOptions:
    """A device whose provider starts and takes no node, as Azure's does in every build of ORT."""
    monkeypatch.setitem(onnxruntime_session.PROVIDERS, "cuda", "AzureExecutionProvider")
    monkeypatch.setattr(onnxruntime_session, "provider_options", lambda device, component: {})
    return SessionOptions(Device("cuda"))


def test_a_provider_that_fails_to_start_is_not_a_silent_fall_back(tmp_path, monkeypatch):
    """onnxruntime_inference_collection.py: with enable_fallback, the default, a provider that raises is printed and
    replaced, also in the middle of a run ("EP Error ... Falling back to ... and retrying").
    """
    options = stand_in(monkeypatch)
    bundle = affine_bundle(tmp_path / "b")
    with monkeypatch.context() as patched, pytest.raises(UnavailableError, match="would have used the CPU"):
        patched.setattr(ort.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
        OrtSession(bundle, "affine", options)
    opened = OrtSession(bundle, "affine", CPU)
    assert opened._session._enable_fallback is False


@pytest.mark.parametrize("records", [True, False])
def test_a_node_that_the_device_does_not_take_is_never_computed_on_the_cpu(tmp_path, monkeypatch, records):
    """inference_session.cc: "This session contains graph nodes that are assigned to the default CPU EP, but fallback to
    CPU EP has been explicitly disabled" (session.disable_cpu_ep_fallback). Newer releases name the nodes.
    """
    monkeypatch.setattr(onnxruntime_session, "RECORDS_PLACEMENT", records)
    with pytest.raises(DeployError, match="1 Gemm" if records else "explicitly disabled by the user"):
        OrtSession(affine_bundle(tmp_path / "b"), "affine", stand_in(monkeypatch))


def test_shapes_may_be_worked_out_on_the_cpu(tmp_path, monkeypatch):
    """fallback_cpu_capability.cc, GetCpuPreferredNodes: ORT itself places "a subgraph that doing shape calculation" on
    the CPU, so that session.disable_cpu_ep_fallback would refuse every graph with dynamic shapes.
    """
    shapes = graph([("x", TensorProto.FLOAT, ["batch", 4])], [("y", TensorProto.INT64, [1])],
                   [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("ReduceProd", ["s"], ["y"])])
    part = dataclasses.replace(AFFINE, outputs=(TensorSpec("y", "int64", (1,)),))
    OrtSession(affine_bundle(tmp_path / "b", shapes, part), "affine", stand_in(monkeypatch))


def test_tensorrt_for_rtx_is_a_plug_in_and_not_offered(tmp_path):
    """onnxruntime_inference_collection.py: "NvTensorRTRTXExecutionProvider is only available as a plugin EP registered
    by the application."
    """
    with pytest.raises(InputError, match=r"plug-in, which is not offered .*build with --target tensorrt-rtx"):
        OrtSession(affine_bundle(tmp_path / "b"), "affine", SessionOptions(Device("tensorrt-rtx")))


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[Any]:
    """What ONNX Runtime would be asked for, by a session that does not open."""
    found: list[Any] = []

    def session(file: str, settings: Any, **rest: Any) -> None:
        found.append(rest)
        raise RuntimeError("no GPU here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnxruntime_session, "available_provider", lambda kind: onnxruntime_session.PROVIDERS[kind])
    monkeypatch.setattr(ort, "InferenceSession", session)
    return found


def test_cuda_comes_after_tensorrt_and_the_cpu_is_left_to_ort(tmp_path, asked):
    """TensorRT-ExecutionProvider.md: "it is recommended you also register CUDAExecutionProvider to allow Onnx Runtime
    to assign nodes to CUDA execution provider that TensorRT does not support."
    """
    with pytest.raises(BundleError):
        OrtSession(affine_bundle(tmp_path / "b"), "affine", SessionOptions(Device("tensorrt")))
    assert [name for name, _ in asked[0]["providers"]] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert asked[0]["enable_fallback"] == 0


@pytest.mark.parametrize(("device", "ids"), [("cuda", ["0"]), ("cuda:1", ["1"]), ("tensorrt:3", ["3", "3"])])
def test_every_provider_gets_the_number_of_the_gpu(tmp_path, asked, device, ids):
    """CUDA-ExecutionProvider.md and TensorRT-ExecutionProvider.md, device_id: "The device ID. Default value: 0"."""
    with pytest.raises(BundleError):
        OrtSession(affine_bundle(tmp_path / "b"), "affine", SessionOptions(Device.parse(device)))
    assert [options["device_id"] for _, options in asked[0]["providers"]] == ids


def test_outputs_lie_on_the_gpu_that_was_asked_for(tmp_path, monkeypatch):
    """onnxruntime_inference_collection.py, ortvalue_from_shape_and_type: "device_id: device id, e.g. 0"."""
    allocated: list[Any] = []
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", lambda *arguments: allocated.append(arguments))
    session = OrtSession(affine_bundle(tmp_path / "b"), "affine", CPU)
    runner = onnxruntime_session._BoundRunner(session._session, AFFINE, "cuda", 2)
    with pytest.raises(Exception, match="None"):
        runner.run({"x": X})
    assert allocated == [([2, 3], np.float32, "cuda", 2)]


def conversion(mode: str) -> Conversion:
    return Conversion(precision="fp16", mode=mode, converted={}, float32={}, float32_nodes={}, casts=0,
                      weight_bytes_before=8, weight_bytes_after=4)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_what_a_gpu_would_compute_in_float32_is_refused_with_the_build_that_does_not(tmp_path, monkeypatch, precision):
    """Our own: storage graphs widen every weight by a Cast, which ORT folds into float32 weights when it loads them;
    issue 10743: "TRT EP only supports quantization format with symmetric activation and weight".
    """
    stored = GraphDetails(conversion=conversion("storage") if precision in ("fp16", "bf16") else None)
    for details in (stored, GraphDetails()):
        part = dataclasses.replace(AFFINE, precision=precision, details=details)
        for device in ("cuda", "tensorrt"):
            with pytest.raises(InputError, match=f"{precision} is in a form for CPUs.*build with --device {device}"):
                onnxruntime_session.check_arithmetic(part, device, "unet")
        onnxruntime_session.check_arithmetic(part, "cpu", "unet")
    computing = dataclasses.replace(AFFINE, precision=precision, details=GraphDetails(conversion=conversion("compute")))
    onnxruntime_session.check_arithmetic(computing, "cuda", "unet")


def test_engines_of_two_fine_tunes_are_never_cached_in_one_folder(tmp_path, monkeypatch):
    """model_metadef_id_generator.h: the key is made "using the model path if available, or the model input names and
    the output names from all nodes": no weights; microsoft/onnxruntime#6455, two models of one structure, one engine.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = affine_bundle(tmp_path / "a").component("affine")
    other = affine_model()
    other.graph.initializer[0].raw_data = bytes(48)
    second = affine_bundle(tmp_path / "b", other).component("affine")
    folders = [provider_options(Device("tensorrt"), part)[f"trt_{kind}_cache_path"] for part in (first, second)
               for kind in ("engine", "timing")]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert provider_options(Device("tensorrt"), first)["trt_engine_cache_path"] == folders[0]


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", ""), ("fp16", "fp16"), ("bf16", "bf16"),
                                                    ("int8", "fp16 int8")])
def test_tensorrt_up_to_10_is_allowed_what_the_graph_holds(tmp_path, monkeypatch, precision, allowed):
    """microsoft/onnxruntime#13381, a QDQ graph: "Int8 precision has been set for a layer or layer output, but int8 is
    not configured in the builder". TensorRT-ExecutionProvider.md: no calibration table with QDQ graphs.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = provider_options(Device("tensorrt"), dataclasses.replace(AFFINE, precision=precision))
    assert [k for k in ("fp16", "bf16", "int8") if options[f"trt_{k}_enable"] == "1"] == allowed.split()
    assert not any("calibration" in name for name in options)


def test_a_device_of_another_backend_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"for ONNX Runtime does not run on 'gpu'.*one of cpu, cuda, tensorrt"):
        Session.open(affine_bundle(tmp_path / "b"), "affine", SessionOptions(Device("gpu")))


@pytest.mark.parametrize("content", [b"", b"not a graph", affine_model().SerializeToString()[:150]])
def test_a_corrupt_graph_is_a_broken_bundle(tmp_path, content):
    with pytest.raises(BundleError) as caught:
        Session.open(affine_bundle(tmp_path / "b", content), "affine", CPU)
    assert caught.value.where == "affine" and "\n" not in str(caught.value)


def test_an_operator_without_kernel_is_a_broken_bundle(tmp_path):
    model = affine_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BundleError, match="NoSuchOperator"):
        Session.open(affine_bundle(tmp_path / "b", model.SerializeToString()), "affine", CPU)


def test_a_graph_whose_names_are_not_the_manifests_is_refused(tmp_path):
    part = dataclasses.replace(AFFINE, outputs=(TensorSpec("out", "float32", ("batch", 3)),))
    with pytest.raises(BundleError, match="outputs"):
        Session.open(affine_bundle(tmp_path / "b", part=part), "affine", CPU)


def test_a_graph_that_contradicts_the_manifest_at_run_time_is_bad_input(tmp_path):
    part = dataclasses.replace(AFFINE, inputs=(TensorSpec("x", "float32", ("batch", "width")),))
    with pytest.raises(InputError, match="does not take these inputs"):
        Session.open(affine_bundle(tmp_path / "b", part=part), "affine", CPU).run({"x": np.zeros((2, 5), np.float32)})


def test_out_of_memory_is_something_the_machine_lacks(tmp_path):
    wide = graph([("n", TensorProto.INT64, [1])], [("y", TensorProto.FLOAT, ["m"])],
                 [helper.make_node("ConstantOfShape", ["n"], ["y"])])
    part = component((TensorSpec("n", "int64", (1,)),), (TensorSpec("y", "float32", ("m",)),), {},
                     file="components/affine/model.onnx")
    session = Session.open(affine_bundle(tmp_path / "b", wide, part), "affine", CPU)
    with pytest.raises(UnavailableError, match="out of memory"):
        session.run({"n": np.array([1 << 50])})


def test_external_data_is_read_in_place(tmp_path):
    bundle = affine_bundle(tmp_path / "b", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert "components/affine/model.onnx.data" in bundle.component("affine").files
    np.testing.assert_allclose(Session.open(bundle, "affine", CPU).run({"x": X})["y"], Y, rtol=1e-6)


def test_external_data_is_read_through_the_links_of_the_hubs_cache(tmp_path):
    """ONNX Runtime demands that external data stays in the model's folder: allowed is that of the linked graph, too."""
    bundle = affine_bundle(tmp_path / "b", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    linked = Bundle.open(as_hub_snapshot(bundle.path, tmp_path / "models--acme--affine"))
    np.testing.assert_allclose(Session.open(linked, "affine", CPU).run({"x": X})["y"], Y, rtol=1e-6)


def test_onnxruntime_optimizes_all_it_can_with_as_many_threads_as_asked():
    options = session_options(AFFINE, SessionOptions(threads=3))
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.intra_op_num_threads == 3


def test_bound_outputs_reuse_a_threads_buffer_and_stay_the_callers(tmp_path):
    """The device path, run on the CPU's memory: the same code binds CUDA buffers."""
    bundle = affine_bundle(tmp_path / "b")
    session = OrtSession(bundle, "affine", CPU)
    session._bound = onnxruntime_session._BoundRunner(session._session, AFFINE, "cpu", 0)
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
    session._bound = onnxruntime_session._BoundRunner(session._session, part, "cpu", 0)
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
    assert provider_options(Device("cuda"), AFFINE)["use_tf32"] == "0"
    assert provider_options(Device("cuda"), dataclasses.replace(AFFINE, precision="fp16"))["use_tf32"] == "1"
    tensorrt = provider_options(Device("tensorrt"), AFFINE)
    assert tensorrt["trt_fp16_enable"] == "0" and tensorrt["trt_engine_cache_path"].startswith(str(tmp_path))
    assert tensorrt["trt_profile_max_shapes"] == "x:8x4"
    assert provider_options(Device("cpu"), AFFINE) == {}


def test_a_closed_session_says_so_and_has_let_go_of_its_graph(session):
    alive = weakref.ref(session._session)
    session.run({"x": X})
    session.close()
    session.close()
    assert alive() is None
    with pytest.raises(DeployError, match="the session is closed") as caught:
        session.run({"x": X})
    assert caught.value.exit_code == 1, "a fault of the program, not of its user"


def test_a_format_without_runtime_is_named(tmp_path):
    part = dataclasses.replace(AFFINE, format="safetensors", details=SourceDetails(library="diffusers"))
    with pytest.raises(BundleError, match="no runtime runs the format 'safetensors'"):
        Session.open(affine_bundle(tmp_path / "b", part=part), "affine", CPU)


def test_rank_zero_and_fixed_axes_are_checked():
    part = component((TensorSpec("n", "int64", (2, "k")), TensorSpec("m", "int64", ("k",))), (),
                     {"k": Axis("k", ShapeRange(2, 2, 8), 2)})
    from runtimes.bundle.tensors import bind_axes

    assert bind_axes(part.inputs, {"n": np.zeros((2, 4), int), "m": np.zeros(4, int)}, part.axes, "p") == {"k": 4}
    with pytest.raises(InputError, match="another input has 4"):
        bind_axes(part.inputs, {"n": np.zeros((2, 4), int), "m": np.zeros(2, int)}, part.axes, "p")
    with pytest.raises(InputError, match="multiples of 2"):
        bind_axes(part.inputs, {"n": np.zeros((2, 3), int), "m": np.zeros(3, int)}, part.axes, "p")


def test_the_models_of_these_tests_are_valid():
    onnx.checker.check_model(affine_model(), full_check=True)
