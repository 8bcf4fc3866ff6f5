"""INT8 builds: the plan for each answer, a whole build within its budget, what is refused, what is reused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibration.integers.ranges import Scheme
from deploy.building.run_build import run_build
from deploy.core.plan import Skip, Step
from deploy.core.spec import BuildSpec, make_spec
from deploy.model.source_bundle import open_origin
from deploy.passes.precision import Precision
from deploy.passes.quantize import Quantize
from deploy.quantization.calibration_data import at_common_size
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Manifest
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError, ParityError
from tests.deploy.conftest import Cli, assert_refused


def exported(spec: BuildSpec) -> Manifest:
    """A manifest as optimize leaves it."""
    manifest = open_origin(spec).manifest
    parts = {n: replace(c, format="onnx", precision="fp32", file=f"components/{n}/model.onnx", files={})
             for n, c in manifest.components.items()}
    return replace(manifest, components=parts)


def planned(**options: Any) -> Step:
    spec = BuildSpec(precision="int8", **options)
    step = Quantize().plan(exported(spec), spec)
    assert isinstance(step, Step)
    return step


@pytest.fixture(scope="session")
def int8_bundle(build_cache: Path, reference_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The reference model in INT8, verified, calibrated on few samples."""
    spec = BuildSpec(precision="int8", calibration_samples=24)
    bundle = run_build(spec, tmp_path_factory.mktemp("int8") / "bundle", cache_root=build_cache).bundle
    assert any((build_cache / "calibration").iterdir())
    return bundle


def test_other_precisions_skip_it():
    spec = BuildSpec()
    assert isinstance(Quantize().plan(exported(spec), spec), Skip)


def test_each_target_gets_the_integers_that_its_kernels_take():
    assert planned(cpu="vnni").config["scheme"] == {"quantize_outputs": True}
    assert planned(target="openvino", cpu="vnni").config["scheme"] == {"give_biases": True}
    assert planned(target="tensorrt-rtx").config["scheme"] == {"signed": True}


@pytest.mark.parametrize(("cpu", "limit"), [("vnni", 127), ("avx2", 63)])
def test_the_processor_that_the_bundle_is_for_decides_how_large_weights_may_be(cpu: str, limit: int):
    assert Scheme(**planned(cpu=cpu).config["scheme"]).weight_limit == limit


def test_only_components_with_recorded_ranges_depend_on_the_others():
    step = planned()
    assert step.reads["text_encoder"] == ("text_encoder",)
    assert set(step.reads["unet"]) == set(step.after.components)
    assert all(reads == (name,) for name, reads in planned(quantization="dynamic").reads.items())
    assert "calibration" not in planned(quantization="weight-only").config


def test_a_graph_below_float32_is_a_wrong_order():
    spec = BuildSpec(precision="int8")
    manifest = exported(spec)
    unet = replace(manifest.components["unet"], precision="fp16")
    with pytest.raises(InputError, match="unet is onnx in fp16"):
        Quantize().plan(replace(manifest, components={**manifest.components, "unet": unet}), spec)


def test_16_bits_take_what_integers_leave_on_tensorrt_alone():
    spec = BuildSpec(precision="int8", target="tensorrt-rtx")
    step = Precision().plan(planned(target="tensorrt-rtx").after, spec)
    assert isinstance(step, Step)
    assert set(step.reads) == set(step.after.components)
    assert step.after.components["unet"].precision == "int8"
    assert isinstance(Precision().plan(planned().after, BuildSpec(precision="int8")), Skip)


def test_dynamic_is_refused_where_there_are_no_kernels_for_it():
    with pytest.raises(InputError, match="no kernels"):
        planned(quantization="dynamic", target="tensorrt-rtx")


def test_calibration_prompts_are_not_what_is_scored():
    from deploy.parity.comparison_options import options_for

    prompts = planned().config["calibration"]["prompts"]
    options = options_for("reference", ())
    assert len(prompts) == 17
    assert not set(prompts) & {*options.retrieval_prompts, *options.prompts}


def test_plans_of_unets_without_masks_are_what_they_were():
    """A new key would quantize every model again that is in somebody's cache."""
    assert set(planned().config["calibration"]) == {"prompts", "samples", "steps", "strength", "guidance_scale"}


def test_int8_is_a_third_of_the_bytes_and_keeps_what_is_generated(int8_bundle: Bundle, reference_bundle: Path):
    manifest, full = int8_bundle.manifest, Bundle.open(reference_bundle).manifest
    unet = manifest.components["unet"]
    assert unet.bytes <= 0.30 * full.components["unet"].bytes
    assert sum(c.bytes for c in manifest.components.values()) <= 0.35 * sum(c.bytes for c in full.components.values())
    assert manifest.verified
    assert manifest.parity is not None
    assert manifest.parity["ok"]
    retrieval = manifest.parity["retrieval"]
    assert retrieval["reference"] - retrieval["bundle"] <= 0.02
    assert unet.parity is not None
    assert 1e-3 < unet.parity["relative_l2"] < 0.15


def test_the_manifest_says_what_each_layer_became_and_what_it_bought(int8_bundle: Bundle):
    unet = int8_bundle.manifest.components["unet"]
    summary = unet.graph.quantization
    assert summary is not None and summary.recipe == "hybrid"
    relief = summary.relief
    assert relief is not None and summary.layers["w8a8"] == 154 - len(relief.promoted)
    assert 5 < len(relief.promoted) < 60
    before, after = relief.relative_l2
    assert after <= before / 2
    details = json.loads((int8_bundle.path / "components/unet/quantization.json").read_text())
    assert details["precision_map"]["conv_in/Conv"] == "float"
    assert len(details["precision_map"]) == 159
    assert set(details["ranges"]) == set(details["drift"])
    gain = next(p["gain"] for p in int8_bundle.manifest.measured["passes"] if p["name"] == "quantize")
    assert gain["unet"]["bytes_ratio"] < 0.30
    assert gain["unet"]["seconds_ratio"] > 0
    assert "smaller" in gain["unet"]["verdict"]


def test_another_recipe_uses_the_recording_again(int8_bundle: Bundle, build_cache: Path, tmp_path: Path):
    before = {p: p.stat().st_mtime_ns for p in (build_cache / "calibration").rglob("shard-*.npz")}
    spec = BuildSpec(precision="int8", calibration_samples=24, quantization="static", range_estimator="minmax",
                     verify="no")
    static = run_build(spec, tmp_path / "static", cache_root=build_cache).bundle
    summary = static.manifest.components["unet"].graph.quantization
    assert summary is not None and summary.layers == {"w8a8": 159}
    assert before == {p: p.stat().st_mtime_ns for p in (build_cache / "calibration").rglob("shard-*.npz")}


def test_calibration_generates_at_the_size_that_the_shapes_call_most_common():
    spec = BuildSpec(precision="int8", shapes={"height": ShapeRange(64, 128, 256), "width": ShapeRange(64, 96, 256)})
    codec = at_common_size(exported(spec)).codec
    assert (codec.height, codec.width) == (128, 96)


def test_an_exempt_layer_is_float_in_the_bundle_and_an_unknown_one_names_the_nearest(
    tiny_model: Path, build_cache: Path, tmp_path: Path
):
    options = {"model": str(tiny_model), "precision": "int8", "quantization": "weight-only", "verify": "no"}
    kept = run_build(make_spec({**options, "keep": ("mid_block.*",)}), tmp_path / "b", cache_root=build_cache).bundle
    names = {t.name for t in onnx.load(kept.path / "components/unet/model.onnx").graph.initializer}
    assert "mid_block.resnets.0.conv1.weight" in names
    assert "conv_out.weight/int8" in names
    with pytest.raises(InputError, match="fits no layer") as error:
        run_build(make_spec({**options, "keep": ("midblock.resnets.0.conv1/Conv",)}), tmp_path / "c",
                  cache_root=build_cache)
    assert "mid_block.resnets.0.conv1/Conv" in error.value.fix


def test_a_broken_budget_names_the_layers_it_comes_from(
    int8_bundle: Bundle, build_cache: Path, tmp_path: Path
):
    spec = BuildSpec(precision="int8", calibration_samples=24, budget={"component_relative_l2": 0.02})
    with pytest.raises(ParityError, match="pass quantize, unet") as error:
        run_build(spec, tmp_path / "out", cache_root=build_cache)
    assert "relative L2 rises most at" in error.value.what
    assert "--keep" in error.value.what
    assert "ff.net.2/MatMul" in error.value.what


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--calibration-samples", "1"), "1 sample says nothing"), (("--quantization", "triple"), "quantization"),
     (("--range-estimator", "median"), "range_estimator"), (("--calibration-prompts", "missing.txt"), "missing.txt")],
)
def test_bad_calibration_options_are_one_line_and_nothing_is_written(cli: Cli, tmp_path: Path, options, word):
    assert_refused(cli("build", "--precision", "int8", *options, "-o", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def test_prompt_files_that_are_empty_or_not_text_are_refused(cli: Cli, tmp_path: Path):
    for content, word in ((b"", "no prompt"), (b"\xff\xfe", "no prompt"), (b"a\xff", "not UTF-8")):
        (tmp_path / "p.txt").write_bytes(content)
        assert_refused(cli("build", "--precision", "int8", "--calibration-prompts", tmp_path / "p.txt"), word)
