"""`--text-encoder-bits 4`: builds for the CPU runtimes and TensorRT, what is refused, what default builds keep."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtimes
from deploy.building.run_build import run_build
from deploy.core.plan import Step
from deploy.core.spec import BuildSpec
from deploy.passes.precision import Precision
from deploy.passes.quantize import Quantize
from deploy.report.page import reproduction
from runtimes.backends.openvino_session import new_core
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import to_json
from runtimes.errors import InputError, ParityError
from tests.deploy.conftest import Cli, assert_refused
from tests.deploy.test_pass_quantize import exported, planned
from tests.parity.pipelines import write_model

NAME = "text_encoder"


def spec_of(**options: Any) -> BuildSpec:
    return BuildSpec(**{"precision": "int8", "quantization": "weight-only", "text_encoder_bits": 4, **options})


@pytest.fixture(scope="module")
def bundles(build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The reference model: "onnxruntime" and "openvino" in 4 bits, compared, and "8 bits" beside them."""
    folder = tmp_path_factory.mktemp("bits")
    specs = {"onnxruntime": spec_of(verify="quick"), "openvino": spec_of(verify="components", target="openvino"),
             "8 bits": spec_of(text_encoder_bits=8, verify="no")}
    return {name: run_build(spec, folder / name, cache_root=build_cache).bundle for name, spec in specs.items()}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_bundle_is_within_the_budget_of_int8_and_generates(bundles: dict[str, Bundle], target: str):
    manifest = bundles[target].manifest
    component = manifest.components[NAME]
    assert manifest.parity is not None and manifest.parity["ok"]
    assert (manifest.parity["images"]["count"] > 0) == (target == "onnxruntime")
    assert component.parity is not None
    assert component.parity["budget"] == 0.15
    assert 0.01 < component.parity["relative_l2"] < 0.08
    assert {n: c.precision for n, c in manifest.components.items()} == {
        NAME: "int4", "unet": "int8", "vae_decoder": "int8", "vae_encoder": "int8"}
    image = runtimes.load(bundles[target].path)("a red apple", steps=3, seed=0)[0]
    assert np.asarray(image).std() > 5


def test_it_is_half_of_8_bits_and_the_table_of_words_a_quarter(bundles: dict[str, Bundle]):
    four, eight = (bundles[name].component(NAME) for name in ("onnxruntime", "8 bits"))
    assert four.bytes < 0.45 * eight.bytes
    tensors = {t.name: t for t in onnx.load(bundles["onnxruntime"].file(four.file)).graph.initializer}
    table = next(t for name, t in tensors.items() if name.endswith("token_embedding.weight/int8"))
    assert len(table.raw_data) == 2048 * 192
    largest = max(len(t.raw_data) for t in tensors.values() if t.data_type == onnx.TensorProto.FLOAT)
    assert largest < 150_000  # scales and positions


def test_onnx_runtime_gets_its_own_products(bundles: dict[str, Bundle]):
    graph = onnx.load(bundles["onnxruntime"].file(bundles["onnxruntime"].component(NAME).file)).graph
    products = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == 18
    assert not [n for n in graph.node if n.op_type in ("MatMul", "Gemm", "DequantizeLinear")]
    attributes = {a.name: a.i for a in products[0].attribute}
    assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (4, 32, 4)


def test_openvino_keeps_the_weights_in_4_bits_once_compiled(bundles: dict[str, Bundle]):
    bundle = bundles["openvino"]
    core = new_core()
    model = core.read_model(str(bundle.file(bundle.component(NAME).file)))
    stored: Counter[str] = Counter()
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant":
            stored[op.get_output_element_type(0).get_type_name()] += int(np.prod(op.get_output_shape(0)))
    assert stored["i4"] == 18 * 192 * 192 * 4 // 2 == 1327104
    assert stored["i8"] == 2048 * 192
    assert stored["f32"] < 100_000
    layers = core.compile_model(model, "CPU").get_runtime_model().get_ordered_ops()
    weights = [op.input(1).get_element_type().get_type_name() for op in layers
               if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    assert weights == ["i4"] * 18


def test_inspect_report_and_details_say_it(bundles: dict[str, Bundle], cli: Cli):
    bundle = bundles["onnxruntime"]
    shown = cli("inspect", bundle.path)
    assert any(NAME in line and "int4" in line for line in shown.out.splitlines())
    summary = to_json(bundle.component(NAME).graph.quantization)
    assert summary["layers"] == {"w4": 18, "w8": 1}
    assert summary["parameters"] == {"w4": 1327104, "w8": 393216}
    assert summary["blocks"] == {"bits": 4, "inputs": 32, "operator": "MatMulNBits"}
    layers = json.loads((bundle.path / "components" / NAME / "quantization.json").read_text())["precision_map"]
    assert Counter(layers.values()) == summary["layers"]
    command, changed = reproduction(bundle.manifest)
    assert command.endswith("--precision int8 --spec build.yaml")
    assert "text_encoder_bits: 4" in changed


def test_engines_read_blocks_with_positive_scales(build_cache: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    model = write_model(tmp_path / "model", context=32)
    # Untrained weights lose 0.23 of the hidden states, on every target the same; int8's budget is 0.15.
    spec = spec_of(model=str(model), target="tensorrt-rtx", verify="components", budget={"component_relative_l2": 0.3},
                   engine={"keep_graph": True, "capabilities": "SM89"})
    component = run_build(spec, tmp_path / "b", cache_root=build_cache).bundle.component(NAME)
    assert component.precision == "int4"
    assert component.details_as(EngineDetails).engine_layers["INT4"] == 12
    assert component.parity is not None
    assert 0.1 < component.parity["relative_l2"] < 0.28
    graph = onnx.load(tmp_path / "b" / component.details_as(EngineDetails).graph).graph
    tensors = {t.name: t for t in graph.initializer}
    blocks = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert len(blocks) == 12
    for node in blocks:
        scale = onnx.numpy_helper.to_array(tensors[node.input[1]])
        assert scale.dtype == np.float16
        assert (scale > 0).all()


def test_a_broken_budget_says_that_8_bits_are_closer(build_cache: Path, tmp_path: Path):
    with pytest.raises(ParityError, match="pass quantize, text_encoder") as error:
        run_build(spec_of(budget={"component_relative_l2": 0.02}), tmp_path / "b", cache_root=build_cache)
    assert "--text-encoder-bits 8" in error.value.what


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--text-encoder-bits", "4"), "needs --precision int8 or auto"),
     (("--precision", "fp16", "--text-encoder-bits", "4"), "needs --precision int8 or auto"),
     (("--precision", "int8", "--text-encoder-bits", "5"), "text_encoder_bits"),
     (("--precision", "int8", "--text-encoder-bits", "0"), "text_encoder_bits")],
)
def test_bits_that_make_no_sense_are_one_line_and_nothing_is_written(cli: Cli, tmp_path: Path, options, word: str):
    assert_refused(cli("build", *options, "-o", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_text_encoder_is_refused_before_any_work():
    spec = spec_of()
    manifest = exported(spec)
    without = {name: c for name, c in manifest.components.items() if name != NAME}
    with pytest.raises(InputError, match="no text encoder"):
        Quantize().plan(replace(manifest, components=without), spec)


def test_both_text_encoders_of_xl_are_stored_in_4_bits():
    spec = spec_of()
    manifest = exported(spec)
    conditioner = manifest.pipeline.conditioner
    second = replace(conditioner.encoders[0], component="text_encoder_2", tokenizer="tokenizer_2")
    roles = replace(manifest.pipeline, conditioner=replace(conditioner, encoders=(*conditioner.encoders, second)))
    manifest = replace(manifest, pipeline=roles,
                       components={**manifest.components, "text_encoder_2": manifest.components[NAME]})
    step = Quantize().plan(manifest, spec)
    assert isinstance(step, Step)
    assert {n for n, recipe in step.config["recipes"].items() if recipe == "weight-only-4"} == {NAME, "text_encoder_2"}


def test_only_tensorrt_takes_16_bits_beside_them_and_they_stay_int4():
    spec = spec_of(target="tensorrt-rtx")
    quantized = planned(target="tensorrt-rtx", text_encoder_bits=4)
    step = Precision().plan(quantized.after, spec)
    assert isinstance(step, Step)
    assert step.after.components[NAME].precision == "int4"
    assert step.after.components["unet"].precision == "int8"


def test_default_builds_have_the_spec_and_the_config_that_they_had_before():
    assert "text_encoder_bits" not in BuildSpec().resolved()
    assert spec_of(text_encoder_bits=8).resolved() == BuildSpec(precision="int8", quantization="weight-only").resolved()
    config = planned().config
    assert config == planned(text_encoder_bits=8).config
    assert set(config) == {"recipes", "scheme", "estimator", "keep", "methods", "relative_l2", "calibration"}
    assert config["recipes"][NAME] == "weight-only"
    assert Quantize.version == 6
