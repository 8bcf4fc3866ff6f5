"""The passes engine, precision and openvino: what they plan, refuse and write."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.targets_and_recipes import scheme_of
from deploy.core.plan import Skip, Step, Unavailable, structure
from deploy.core.spec import BuildSpec
from deploy.parity.provable_graphs import computes_in_16_bits, provable
from deploy.passes import engine as engine_pass
from deploy.passes.engine import Engine, choose_builder, component_profiles
from deploy.passes.openvino import OpenVino
from deploy.passes.optimize import Optimize
from deploy.passes.precision import Precision, patterns_for
from exporters.precision.float32_nodes import names_in
from runtimes.backends.onnxruntime_session import OrtSession, check_arithmetic
from runtimes.backends.session import SessionOptions
from runtimes.bundle.details import EngineDetails, OpenVinoDetails
from runtimes.bundle.folder import Bundle, records_below, sha256_of
from runtimes.bundle.tensors import Axis, ShapeRange
from runtimes.errors import InputError
from tests.runtimes.fakes import write_pipeline_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return write_pipeline_bundle(tmp_path_factory.mktemp("passes") / "bundle", 20)


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(engine_pass, "gpu_here", lambda: "")


def spec(target: Any = "tensorrt", precision: Any = "fp32", **more: Any) -> BuildSpec:
    return BuildSpec(target=target, precision=precision, **more)


def builders(monkeypatch, *names: str) -> None:
    monkeypatch.setattr("exporters.tensorrt.engine_builder.installed", lambda builder: builder in names)


def planned(bundle: Bundle, instance: Any, wanted: Any) -> Step:
    step = instance.plan(bundle.manifest, wanted)
    assert isinstance(step, Step), step
    return step


# ---- onnxruntime on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "mode"), [("cpu", "storage"), ("cuda", "compute"), ("tensorrt", "compute")])
def test_float16_is_computed_in_on_a_gpu_and_only_stored_for_a_cpu(bundle, device, mode):
    assert planned(bundle, Precision(), spec("onnxruntime", "fp16", device=device)).config["mode"] == mode


def test_graphs_for_a_gpu_have_none_of_the_fusions_for_cpus_and_symmetric_integers(bundle):
    step = planned(bundle, Optimize(), spec("onnxruntime", "fp16", device="cuda"))
    assert step.config == {"target": "tensorrt"}
    target = spec("onnxruntime", "int8", device="tensorrt").graph_target
    assert scheme_of(target, sums_in_32_bits=False) == {"signed": True}


@pytest.mark.parametrize(("options", "message"), [
    ({"target": "openvino", "device": "cuda"}, "device cuda is for --target onnxruntime"),
    ({"target": "onnxruntime", "precision": "int8", "device": "cuda"}, "int8 is not for --device cuda"),
    ({"target": "onnxruntime", "precision": "auto", "device": "tensorrt"}, "auto is not for --device tensorrt"),
])
def test_a_device_that_a_build_would_not_honour_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BuildSpec(**options)


def test_a_float16_bundle_for_cuda_holds_float16_products_and_the_one_for_cpus_is_refused_there(bundle, tmp_path):
    for device in ("cuda", "cpu"):
        wanted = spec("onnxruntime", "fp16", device=device)
        step = planned(bundle, Precision(), wanted)
        part = Precision().run(step, "text_encoder", bundle, tmp_path / device)
        if device == "cuda":
            check_arithmetic(part, "cuda", "text_encoder")
            assert computes_in_16_bits(part)
        else:
            with pytest.raises(InputError, match="would compute in float32"):
                check_arithmetic(part, "cuda", "text_encoder")


# ---- which builder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "gpu", "installed", "chosen"), [
    ("tensorrt", "H100, 9.0", ("tensorrt", "tensorrt-rtx"), "tensorrt"),
    ("tensorrt", "", ("tensorrt", "tensorrt-rtx"), "tensorrt-rtx"),
    ("tensorrt", "H100, 9.0", ("tensorrt-rtx",), "tensorrt-rtx"),
    ("tensorrt-rtx", "H100, 9.0", ("tensorrt", "tensorrt-rtx"), "tensorrt-rtx"),
])
def test_the_builder_follows_from_target_gpu_and_packages(monkeypatch, target, gpu, installed, chosen):
    builders(monkeypatch, *installed)
    assert choose_builder(target, gpu) == chosen


@pytest.mark.parametrize(("target", "gpu", "installed", "what"), [
    ("tensorrt", "", (), "no TensorRT builder is installed"),
    ("tensorrt", "", ("tensorrt",), "builds for the GPU of this machine, and there is none"),
    ("tensorrt-rtx", "H100, 9.0", ("tensorrt",), "no TensorRT builder is installed"),
])
def test_what_is_missing_is_said_and_no_other_target_taken(monkeypatch, target, gpu, installed, what):
    builders(monkeypatch, *installed)
    found = choose_builder(target, gpu)
    assert isinstance(found, Unavailable) and what in found.what and "tensorrt-rtx" in found.fix


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_other_targets_are_left_alone(bundle):
    assert isinstance(Engine().plan(bundle.manifest, spec("onnxruntime")), Skip)
    assert isinstance(OpenVino().plan(bundle.manifest, spec("tensorrt")), Skip)
    assert isinstance(Precision().plan(bundle.manifest, spec()), Skip)


def test_the_plan_says_builder_and_gpus_and_resolves_every_option(bundle, monkeypatch, no_gpu):
    builders(monkeypatch, "tensorrt-rtx")
    step = planned(bundle, Engine(), spec(engine={"capabilities": "SM86+SM89", "optimization_level": 3}))
    assert step.summary == "tensorrt-rtx engines for SM86, SM89"
    assert step.config["options"]["optimization_level"] == 3
    assert step.config["options"]["workspace_bytes"] == 0
    assert {c.format for c in step.after.components.values()} == {"tensorrt"}
    assert step.after.components["unet"].file == "components/unet/engine.trt"


def test_an_order_that_cannot_work_is_refused(bundle):
    parts = {n: dataclasses.replace(c, format="safetensors") for n, c in bundle.manifest.components.items()}
    before = dataclasses.replace(bundle.manifest, components=parts)
    for instance, wanted in ((Engine(), spec()), (Precision(), spec(precision="fp16")), (OpenVino(), spec("openvino"))):
        with pytest.raises(InputError, match="is safetensors, expected onnx"):
            instance.plan(before, wanted)


def test_a_profile_outside_the_models_limits_is_refused_when_planning(bundle, monkeypatch, no_gpu):
    builders(monkeypatch, "tensorrt-rtx")
    wanted = spec(profiles=({"batch": ShapeRange(1, 1, 64)},))
    with pytest.raises(InputError, match=r"profile batch=1:1:64 is outside the model's limits 1 to 8"):
        Engine().plan(bundle.manifest, wanted)


def test_profiles_in_images_and_pixels_become_rows_and_latents(bundle):
    parts = dict(bundle.manifest.components)
    doubled = {**parts["unet"].axes, "batch": Axis("images, doubled", ShapeRange(1, 2, 16))}
    unet = dataclasses.replace(parts["unet"], axes=doubled)
    config = {"static": False, "profiles": [{"batch": [1, 1, 1], "height": [32, 32, 64]}, {"batch": [4, 4, 8]}]}
    made = component_profiles(unet, bundle.manifest, config, "unet")
    assert made[0]["sample"] == ((1, 2, 8, 4), (2, 2, 8, 4), (2, 2, 16, 16))
    assert made[1]["timestep"] == ((4,), (8,), (16,))


# ---- running ---------------------------------------------------------------------------------------------------------


def test_an_engine_is_built_without_a_gpu(bundle, tmp_path, no_gpu):
    step = planned(bundle, Engine(), spec())
    part = Engine().run(step, "unet", bundle, tmp_path)
    assert (tmp_path / "components/unet/engine.trt").read_bytes()[:4] == b"vtrt"
    assert list(part.files) == [part.file] == ["components/unet/engine.trt"]
    engine = part.details_as(EngineDetails)
    assert engine.builder == "tensorrt-rtx" and "SM89" in engine.compute_capabilities
    assert engine.graph_sha256 == sha256_of(bundle.path / "components/unet/model.onnx")
    assert engine.executed is False and "very ONNX graph" in engine.not_executed
    assert (part.inputs, part.axes) == (bundle.component("unet").inputs, bundle.component("unet").axes)


def test_the_compiled_graph_stays_beside_the_engine_where_it_is_asked_for(bundle, tmp_path, no_gpu):
    step = planned(bundle, Engine(), spec(engine={"capabilities": "SM89", "keep_graph": True}))
    part = Engine().run(step, "unet", bundle, tmp_path)
    graph = part.details_as(EngineDetails).graph
    assert set(part.files) == {part.file, graph}
    assert sha256_of(tmp_path / graph) == part.details_as(EngineDetails).graph_sha256


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize(("target", "mode"), [("tensorrt", "compute"), ("onnxruntime", "storage")])
def test_precision_computes_in_16_bits_on_gpus_and_stores_in_them_on_cpus(bundle, tmp_path, target, mode, low):
    step = planned(bundle, Precision(), spec(target, low))
    assert step.config["mode"] == mode
    part = Precision().run(step, "unet", bundle, tmp_path)
    assert part.precision == low and part.graph.conversion is not None and part.graph.conversion.mode == mode
    assert computes_in_16_bits(part) == (mode == "compute")
    onnx.checker.check_model(str(tmp_path / part.file), full_check=True)


def test_a_decoder_that_overflows_in_float16_stays_in_float32_and_says_so(bundle, tmp_path):
    """As Stable Diffusion XL's does: what it generates is right, values inside it are above 65,504."""
    loud = Bundle.open(shutil.copytree(bundle.path, tmp_path / "loud"))
    file = loud.file(loud.component("vae_decoder").file)
    model = onnx.load(file)
    (output,) = (node for node in model.graph.node if "sample" in node.output)
    output.output[list(output.output).index("sample")] = "quiet"
    scale = onnx.numpy_helper.from_array(np.array(60000, np.float32), "scale")
    model.graph.initializer.append(scale)
    model.graph.node.extend([onnx.helper.make_node("Mul", ["quiet", "scale"], ["loud"], "louder"),
                             onnx.helper.make_node("Div", ["loud", "scale"], ["sample"], "quieter")])
    file.chmod(0o644)
    onnx.save(model, file)
    step = planned(loud, Precision(), spec("tensorrt", "fp16"))
    part = Precision().run(step, "vae_decoder", loud, tmp_path / "low")
    assert part.precision == "fp32" and "are not finite" in part.graph.not_fp16
    kept = onnx.load(tmp_path / "low" / part.file)
    assert not any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in kept.graph.initializer)
    after = dataclasses.replace(step.after, components={**step.after.components, "vae_decoder": part})
    assert structure(after)["vae_decoder"] == structure(step.after)["vae_decoder"], "the plan's prediction holds"
    well = Precision().run(step, "vae_decoder", bundle, tmp_path / "well")
    assert well.precision == "fp16" and not well.graph.not_fp16


def test_a_16_bit_graph_is_proven_on_its_emulation(bundle, tmp_path):
    step = planned(bundle, Precision(), spec("tensorrt", "fp16"))
    part = Precision().run(step, "unet", bundle, tmp_path / "low")
    for file in bundle.manifest.all_files():
        if not file.startswith("components/unet/"):
            (tmp_path / "low" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "low" / file).write_bytes((bundle.path / file).read_bytes())
    components = {**bundle.manifest.components, "unet": part}
    low = Bundle(tmp_path / "low", dataclasses.replace(bundle.manifest, components=components))
    rng = np.random.default_rng(0)
    feeds = {"sample": rng.standard_normal((2, 2, 8, 8)).astype(np.float32),
             "timestep": np.array([900, 900], np.float32),
             "encoder_hidden_states": rng.standard_normal((2, 5, 3)).astype(np.float32)}
    cpu = SessionOptions(threads=1)
    exact = OrtSession(bundle, "unet", cpu).run(feeds)["out_sample"]
    with provable(low, ["unet", "vae_decoder"], tmp_path) as proof:
        rounded = OrtSession(proof, "unet", cpu).run(feeds)["out_sample"]
        assert proof.path != low.path and proof.file(part.file).is_file()
    assert 1e-5 < np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 3e-3
    with provable(low, ["vae_decoder"], tmp_path) as proof:
        assert proof is low, "nothing to replace"


def test_openvino_files_are_written(bundle, tmp_path):
    step = planned(bundle, OpenVino(), spec("openvino"))
    part = OpenVino().run(step, "unet", bundle, tmp_path)
    assert sorted(part.files) == ["components/unet/model.bin", "components/unet/model.xml"]
    assert part.format == "openvino" and part.details_as(OpenVinoDetails).openvino_version


@pytest.mark.parametrize(("instance", "target", "precision"), [
    (Engine(), "tensorrt", "fp32"), (Precision(), "tensorrt", "fp16"), (OpenVino(), "openvino", "fp32"),
])
def test_the_list_of_quantized_layers_stays_beside_the_graph(bundle, tmp_path, no_gpu, instance, target, precision):
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / "components/unet/quantization.json").write_text('{"precision_map": {"conv_in": "int8"}}')
    unet = dataclasses.replace(bundle.component("unet"), files=records_below(copy / "components/unet", copy))
    components = {**bundle.manifest.components, "unet": unet}
    quantized = Bundle(copy, dataclasses.replace(bundle.manifest, components=components))
    part = instance.run(planned(quantized, instance, spec(target, precision)), "unet", quantized, tmp_path / "out")
    kept = "components/unet/quantization.json"
    assert part.files[kept] == unet.files[kept]
    assert (tmp_path / "out" / kept).read_text() == (copy / kept).read_text()


def test_a_pattern_to_keep_need_fit_in_one_component_alone(bundle, tmp_path):
    names = {part: names_in(ir.load(bundle.file(c.file)).graph) for part, c in bundle.manifest.components.items()}
    own = next(n for n in names["unet"] if n not in names["text_encoder"])
    assert patterns_for("unet", bundle, [own]) == [own]
    assert patterns_for("text_encoder", bundle, [own]) == []
    step = planned(bundle, Precision(), spec("tensorrt", "fp16", keep=(own,)))
    assert Precision().run(step, "text_encoder", bundle, tmp_path).precision == "fp16"
    with pytest.raises(InputError, match="'nothing_like_it' fits no layer"):
        patterns_for("unet", bundle, ["nothing_like_it"])
