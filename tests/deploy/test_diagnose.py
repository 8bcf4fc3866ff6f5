"""`diagnose` finds what was broken in a copy of the reference model, with the first check that can see it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from deploy.diagnose.checks import LIMITS, Samples, check_guidance, moments
from deploy.diagnose.probe import Probe
from deploy.diagnose.run_checks import DiagnoseOptions, diagnose_pipeline
from runtimes.bundle.folder import Bundle, records_below, write_manifest
from runtimes.bundle.manifest import FileRecord, Manifest
from runtimes.errors import ParityError
from tests.deploy.conftest import Cli, assert_refused
from tests.runtimes.roles import with_fact

STEPS = 8
CHECKS = ["vae", "unconditional", "text", "guidance"]


@pytest.fixture
def copy(copy: Path) -> Bundle:
    """The copy that a test may change, opened."""
    return Bundle.open(copy)


def reseal(bundle: Bundle) -> Path:
    """Make the manifest vouch for what now lies in the folder."""
    components = {name: dataclasses.replace(c, files=records_below(bundle.path / "components" / name, bundle.path))
                  for name, c in bundle.manifest.components.items()}
    files: dict[str, FileRecord] = {}
    for folder in ("scheduler", "tokenizer"):
        files |= records_below(bundle.path / folder, bundle.path)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, components=components, files=files))
    return bundle.path


def change_weights(bundle: Bundle, name: str, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> int:
    """Rewrite the weights of a component's nodes whose name holds the pattern; how many there were."""
    file = bundle.file(bundle.component(name).file)
    model = ir.load(file)
    count = 0
    for node in model.graph:
        for value in node.inputs if pattern in (node.name or "") else ():
            if value is not None and value.const_value is not None and value.const_value.size > 1000:
                value.const_value = ir.tensor(change(value.const_value.numpy()), name=value.name)
                count += 1
    ir.save(model, file)
    return count


def found_first(target: Path | str, **options) -> tuple[str, str]:
    """The first check that found something, and its advice."""
    diagnosis = diagnose_pipeline(str(target), DiagnoseOptions(steps=STEPS, **options))
    assert [check.name for check in diagnosis.checks] == CHECKS
    wrong = next(check for check in diagnosis.checks if not check.ok)
    with pytest.raises(ParityError, match=f"check {wrong.name}"):
        diagnosis.enforce()
    return wrong.name, wrong.advice


def test_a_sound_bundle_passes_and_its_grid_shows_the_denoising(cli: Cli, reference_bundle: Path):
    result = cli("diagnose", reference_bundle, "--steps", STEPS, "--grid", "grid.png", "--json")
    assert result.code == 0, result
    value = json.loads(result.out)
    assert value["ok"] and [check["name"] for check in value["checks"]] == CHECKS
    vae, unconditional, text, guidance = (check["figures"] for check in value["checks"])
    assert 0.9 < vae["std"] < 1.15 and vae["reconstruction_psnr_db"] > 25
    assert len(unconditional["noise_error"]) == len(text["response"]) == 6
    assert unconditional["mean_relative_noise_error"] < 0.5 and text["prompts_found"] == 1.0
    assert guidance["moved"] > 0.03
    sheet = np.asarray(Image.open("grid.png"), np.float64)
    assert sheet.shape == (4 * 64, 8 * 64, 3)
    last = sheet[:, -64:]
    distance = [np.abs(sheet[:, 64 * i : 64 * (i + 1)] - last).mean() for i in range(8)]
    assert distance[0] > distance[4] > distance[6] > 0, "columns come nearer to the finished image"


def scaled_by(bundle: Bundle, wrong: float) -> Manifest:
    roles = bundle.manifest.pipeline
    return dataclasses.replace(bundle.manifest, pipeline=with_fact(roles, "codec.scaling_factor",
                                                                   roles.codec.scaling_factor * wrong))


@pytest.mark.parametrize(("wrong", "given"), [(0.5, False), (2.0, False), (0.5, True)])
def test_a_wrong_scaling_factor_is_found_by_the_vae_check_which_names_the_right_one(
        copy: Bundle, wrong: float, given: bool):
    factor = copy.manifest.pipeline.codec.scaling_factor
    write_manifest(copy.path, scaled_by(copy, wrong))
    images = tuple(sorted((copy.path / "report" / "images").glob("0[0-7]-reference.png"))) if given else ()
    name, advice = found_first(copy.path, images=images)
    assert name == "vae"
    fitting = float(advice.split(": ")[1].split(" ")[0])
    assert fitting == pytest.approx(factor, rel=0.15 if given or wrong < 1 else 0.4)


def test_cross_attention_of_zeros_is_found_by_the_text_check(copy: Bundle):
    assert change_weights(copy, "unet", "attn2.to_v", np.zeros_like) > 5
    name, advice = found_first(reseal(copy))
    assert name == "text" and "attn2" in advice


def test_a_wrong_prediction_type_is_found_by_the_unconditional_check(copy: Bundle):
    file = copy.file("scheduler/scheduler_config.json")
    config = json.loads(file.read_text())
    assert config["prediction_type"] == "v_prediction"
    file.write_text(json.dumps({**config, "prediction_type": "epsilon"}))
    images = tuple(sorted((copy.path / "report" / "images").glob("0[0-7]-reference.png")))
    name, advice = found_first(reseal(copy), images=images)
    assert name == "unconditional" and "prediction_type" in advice


def test_the_command_line_names_the_check_and_exits_with_3(cli: Cli, copy: Bundle):
    write_manifest(copy.path, scaled_by(copy, 0.5))
    result = cli("diagnose", copy.path, "--steps", STEPS)
    assert result.code == 3 and "wrong" in result.out and "error: check vae: " in result.err


def test_a_model_is_diagnosed_through_pytorch_with_the_bundle_s_figures(reference_bundle: Path):
    model, bundle = (diagnose_pipeline(str(target), DiagnoseOptions(steps=4)).to_json()["checks"]
                     for target in ("reference", reference_bundle))
    for found, expected in zip(model, bundle, strict=True):
        assert found["ok"] == expected["ok"]
    assert model[0]["figures"]["std"] == pytest.approx(bundle[0]["figures"]["std"], rel=1e-3)
    assert model[2]["figures"]["strongest_response"] == pytest.approx(
        bundle[2]["figures"]["strongest_response"], rel=1e-2)


class Indifferent(Probe):
    """Stands in for a probe: every prompt explains every image alike."""

    def __init__(self):
        self.levels = (1, 2)

    def predict(self, latents, prompts, timestep, seed=0):
        return latents, latents


def test_guidance_that_changes_nothing_or_burns_out_is_named():
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    grey, burnt = np.full((2, 8, 8, 3), 0.5, np.float32), np.ones((2, 8, 8, 3), np.float32)

    def check(guided, pixels):
        return check_guidance(Indifferent(), Samples(("a", "b"), guided, pixels, latents, grey, latents, ()))

    assert "changes images by 0" in check(latents, grey).verdict
    assert "clips 100%" in check(latents * 2, burnt).verdict and not check(latents * 2, burnt).ok
    assert check(latents * 2, grey).ok


def test_moments_of_a_normal_distribution_and_of_numbers_that_are_not_finite():
    found = moments(np.random.default_rng(0).standard_normal((4, 4, 64, 64)).astype(np.float32) * 2 + 1)
    assert found["mean"] == pytest.approx(1, abs=0.05) and found["std"] == pytest.approx(2, rel=0.02)
    assert found["kurtosis"] == pytest.approx(3, abs=0.1)
    with pytest.raises(ParityError, match="not finite"):
        moments(np.array([1.0, np.nan], np.float32))
    assert LIMITS.latent_std[0] < 1 < LIMITS.latent_std[1]


def test_what_is_neither_bundle_nor_model_is_refused(cli: Cli, reference_bundle: Path):
    assert_refused(cli("diagnose", "nowhere"), "nowhere", "no such folder")
    Path("broken.png").write_bytes(b"no image")
    assert_refused(cli("diagnose", reference_bundle, "--image", "broken.png"), "broken.png")


def test_a_unet_for_inpainting_is_diagnosed_as_one_that_paints_everything_anew(reference_bundle: Path, copy: Bundle):
    """It ignores mask and masked image, so every figure is that of the U-Net it was made from."""
    import onnx
    from onnx import helper, numpy_helper

    unet, channels = copy.component("unet"), copy.manifest.pipeline.codec.latent_channels
    model = onnx.load(copy.file(unet.file))
    for node in model.graph.node:
        node.input[:] = ["latents_alone" if name == "sample" else name for name in node.input]
    bounds = {"first": 0, "last": channels, "axis": 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([n]), name) for name, n in bounds.items())
    model.graph.node.insert(0, helper.make_node("Slice", ["sample", *bounds], ["latents_alone"], "slice"))
    sample = next(value for value in model.graph.input if value.name == "sample")
    sample.type.tensor_type.shape.dim[1].dim_value = 2 * channels + 1
    onnx.save(model, copy.file(unet.file))
    spec = unet.inputs[0]
    inputs = (dataclasses.replace(spec, shape=(spec.shape[0], 2 * channels + 1, *spec.shape[2:])), *unet.inputs[1:])
    components = {**copy.manifest.components, "unet": dataclasses.replace(unet, inputs=inputs)}
    paints = reseal(Bundle(copy.path, dataclasses.replace(copy.manifest, components=components)))
    found, plain = (diagnose_pipeline(str(folder), DiagnoseOptions(steps=STEPS)).to_json()
                    for folder in (paints, reference_bundle))
    assert found["ok"] and found == plain
