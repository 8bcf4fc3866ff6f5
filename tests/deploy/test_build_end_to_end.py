"""Whole builds: any Stable Diffusion folder, resumed after kill -9, reused, and proven again by `verify`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import runtimes
from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec
from runtimes.bundle.folder import Bundle, record_of
from runtimes.bundle.manifest import FileRecord
from runtimes.inputs import quality_presets as presets
from runtimes.inputs.quality_presets import Measured, Setting
from tests.conftest import ROOT
from tests.deploy.conftest import Cli, assert_refused
from tests.exporters.pipelines import edit_json
from tests.parity.pipelines import write_model


def test_the_reference_model_builds_and_every_component_is_within_the_fp32_budget(reference_bundle: Path):
    manifest = Bundle.open(reference_bundle).manifest
    assert sorted(manifest.components) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for name, component in manifest.components.items():
        assert component.parity is not None, name
        assert component.parity["relative_l2"] <= 1e-4, name
        assert len({tuple(s) for s in component.parity["shapes"]}) >= 3, name
    assert manifest.parity is not None
    assert manifest.parity["images"]["psnr_db"] >= 50
    assert manifest.parity["images"]["count"] == 16
    assert manifest.parity["retrieval"]["bundle"] >= 0.6
    assert manifest.verified
    assert (reference_bundle / "report" / "report.html").is_file()
    after = {cost["name"]: cost.get("relative_l2") for cost in manifest.measured["passes"]}
    assert after["load"] is None and after["optimize"] == {
        name: c.parity["relative_l2"] for name, c in manifest.components.items() if c.parity is not None}


def test_the_second_build_does_no_work(reference_bundle: Path, build_cache: Path):
    began = time.time()
    outcome = run_build(BuildSpec(), reference_bundle, cache_root=build_cache)
    assert outcome.up_to_date
    assert all(p.stat().st_mtime < began for p in reference_bundle.rglob("*") if p.is_file())


def test_two_builds_have_the_same_digest_and_bytes(tiny_model: Path, tmp_path: Path):
    spec = BuildSpec(model=str(tiny_model), verify="no")
    one, two = (run_build(spec, tmp_path / n / "b", cache_root=tmp_path / n / "cache").bundle for n in ("1", "2"))
    assert one.manifest.digest == two.manifest.digest
    assert not one.manifest.verified


@pytest.mark.parametrize(
    ("beta_schedule", "prediction"), [("linear", "v_prediction"), ("scaled_linear", "epsilon")]
)
def test_any_folder_builds_in_old_and_new_layouts(beta_schedule, prediction, tmp_path: Path, build_cache: Path):
    model = write_model(tmp_path / "mine")
    edit_json(model / "scheduler" / "scheduler_config.json", beta_schedule=beta_schedule, prediction_type=prediction)
    bundle = run_build(BuildSpec(model=str(model)), tmp_path / "bundle", cache_root=build_cache).bundle
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["ok"]
    assert bundle.manifest.source.id == "mine"
    images = runtimes.load(bundle.path)(["a cat", "a dog"], steps=3, seed=0, height=32, width=64)
    assert [image.size for image in images] == [(64, 32)] * 2


def test_a_killed_build_resumes_at_the_component_it_was_in(tiny_model: Path, tmp_path: Path):
    cache, out = tmp_path / "cache", tmp_path / "out" / "bundle"
    command = [sys.executable, "-m", "deploy", "build", str(tiny_model), "--no-verify", "-o", str(out)]
    environment = {**os.environ, "LDM_DEPLOY_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    victim = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    exported: list[Path] = []
    for _ in range(1200):
        exported = list(cache.glob("passes/*/components/*/model.onnx"))
        if exported or victim.poll() is not None:
            break
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert exported, "killed before the first component was exported"
    assert not out.exists()
    first = {p: p.stat().st_mtime_ns for p in exported}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert {p: p.stat().st_mtime_ns for p in first} == first, "what was finished is reused"
    assert Bundle.open(out).manifest.components.keys() == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert list(out.parent.iterdir()) == [out]


def sign(folder: Path) -> None:
    """Let the manifest vouch for changed files, as an attacker or a broken pass would."""
    raw = json.loads((folder / "manifest.json").read_text())
    for files in [raw["files"], *(c["files"] for c in raw["components"].values())]:
        for name in files:
            files[name] = dataclasses.asdict(record_of(folder / name))
    (folder / "manifest.json").write_text(json.dumps(raw))


def corrupt_one_weight(folder: Path) -> None:
    import onnx

    file = folder / "components" / "unet" / "model.onnx"
    model = onnx.load(file)
    weight = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 50 * np.abs(values).max()
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, file)


def corrupt_one_scheduler_coefficient(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_end=0.0125)


def fix_one_axis(folder: Path) -> None:
    import onnx

    file = folder / "components" / "vae_decoder" / "model.onnx"
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 8
    onnx.save(model, file)


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [(corrupt_one_weight, "unet"), (corrupt_one_scheduler_coefficient, "beta_end"), (fix_one_axis, "vae_decoder")],
)
def test_a_corruption_breaks_the_gate_and_is_named(corrupt: Callable[[Path], None], named: str, copy: Path, cli: Cli):
    corrupt(copy)
    sign(copy)
    result = cli("verify", copy)
    assert_refused(result, "verify, ", named, code=3)


def test_verify_prints_the_promised_object(reference_bundle: Path, cli: Cli):
    result = cli("verify", reference_bundle, "--json")
    value = json.loads(result.out)
    assert (result.code, value["ok"], value["unverified"]) == (0, True, [])
    assert set(value["components"]["unet"]) >= {"max_abs", "relative_l2", "cosine", "nonfinite", "shapes"}
    assert len(value["trajectory"]["relative_l2"]) == 25
    assert value["images"]["count"] == 16
    assert set(value["retrieval"]) == {"reference", "bundle"}


def test_inspect_prints_the_manifest_and_shows_what_was_not_verified(reference_bundle: Path, copy: Path, cli: Cli):
    assert json.loads(cli("inspect", reference_bundle, "--json").out)["family"] == "stable-diffusion"
    edit_json(copy / "manifest.json", verified=False)
    assert "NOT VERIFIED" in cli("inspect", copy).out


def test_a_changed_file_is_refused(copy: Path, cli: Cli):
    with (copy / "components" / "unet" / "model.onnx").open("r+b") as stream:
        stream.seek(10_000)
        stream.write(b"\x00\x01\x02\x03")
    assert_refused(cli("generate", copy, "a cat"), "components/unet/model.onnx", "sha256")


def test_a_path_out_of_the_bundle_is_refused(copy: Path, cli: Cli):
    raw = json.loads((copy / "manifest.json").read_text())
    raw["files"]["../secret"] = dataclasses.asdict(FileRecord(1, "0"))
    (copy / "manifest.json").write_text(json.dumps(raw))
    assert_refused(cli("inspect", copy), "../secret", "leaves the bundle")


def test_a_newer_schema_is_refused(copy: Path, cli: Cli):
    edit_json(copy / "manifest.json", schema=99)
    assert_refused(cli("inspect", copy), "99", "upgrade ldm-deploy")


@pytest.mark.parametrize(
    ("options", "word"),
    [(("x" * 100_001,), "100,001"), (("a cat", "--height", "70"), "height"), (("a cat", "--steps", "0"), "steps"),
     (("a cat", "--guidance", "nan"), "guidance"), (("a cat", "--scheduler", "magic"), "magic"), ((), "prompt"),
     (("a cat", "--device", "cuda"), "CUDAExecutionProvider")],
)
def test_unusable_requests_write_no_image(options, word, reference_bundle: Path, cli: Cli):
    result = cli("generate", reference_bundle, *options)
    assert_refused(result, word, code=4 if "cuda" in options else 2)
    assert not Path("out.png").exists()


def test_saved_latents_generate_the_same_image_again(reference_bundle: Path, cli: Cli):
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    np.save("initial.npy", latents)
    options = ("a cat", "--latents", "initial.npy", "--steps", "3")
    assert cli("generate", reference_bundle, *options, "-o", "1.png", "--save-latents", "final.npy").code == 0
    assert cli("generate", reference_bundle, *options, "-o", "2.png").code == 0
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()
    assert np.load("final.npy").shape == (1, 8, 8, 8)


def test_an_image_is_the_start_of_another(reference_bundle: Path, cli: Cli):
    assert cli("generate", reference_bundle, "a dog", "--steps", "4", "-o", "dog.png").code == 0
    options = ("a fox", "--image", "dog.png", "--strength", "0.5", "--steps", "4")
    assert cli("generate", reference_bundle, *options, "-o", "fox.png").code == 0
    assert Path("fox.png").read_bytes() != Path("dog.png").read_bytes()


def test_several_images_get_numbered_names_or_one_sheet(reference_bundle: Path, cli: Cli):
    cli("generate", reference_bundle, "a cat", "-n", "3", "--steps", "2", "-o", "cat.png")
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["cat-1.png", "cat-2.png", "cat-3.png"]
    Path("prompts.txt").write_text("a cat\n\na dog\n")
    cli("generate", reference_bundle, "--prompts", "prompts.txt", "--grid", "2", "--steps", "2", "-o", "sheet.png")
    from PIL import Image

    with Image.open("sheet.png") as sheet:
        assert sheet.size == (128, 64)


def test_doctor_says_what_is_missing_and_what_to_do(cli: Cli):
    findings = json.loads(cli("doctor", "--json").out)
    assert findings["run"]["cpu"]["available"]
    for section in ("build", "run"):
        assert all(f["available"] or f["fix"] for f in findings[section].values())


def test_a_mask_repaints_a_part_and_a_preview_is_written(reference_bundle: Path, cli: Cli):
    from PIL import Image

    assert cli("generate", reference_bundle, "a dog", "--steps", "4", "-o", "dog.png").code == 0
    Image.new("L", (128, 128), 255).save("mask.png")
    options = ("a (fox:1.2)", "--image", "dog.png", "--mask", "mask.png", "--steps", "4", "--weighting",
               "--guidance-interval", "0.25:1", "--guidance-rescale", "0.5", "--preview", "preview.png")
    assert cli("generate", reference_bundle, *options, "-o", "fox.png").code == 0
    with Image.open("preview.png") as preview, Image.open("fox.png") as fox:
        assert preview.size == fox.size == (64, 64)
    assert_refused(cli("generate", reference_bundle, "a dog", "--mask", "mask.png"), "without an image")
    assert_refused(cli("generate", reference_bundle, "a dog", "--guidance-interval", "1"), "not a pair")


def test_a_png_says_how_it_was_made_unless_asked_not_to(reference_bundle: Path, cli: Cli):
    from PIL import Image

    options = ("ein Bär", "--steps", "2", "--seed", "7")
    assert cli("generate", reference_bundle, *options, "-o", "told.png").code == 0
    assert cli("generate", reference_bundle, *options, "--no-metadata", "-o", "silent.png").code == 0
    with Image.open("told.png") as told, Image.open("silent.png") as silent:
        assert told.info == {"prompt": "ein Bär", "seed": "7", "steps": "2", "software": "ldm-deploy",
                             "bundle": Bundle.open(reference_bundle).manifest.digest}
        assert silent.info == {} and told.tobytes() == silent.tobytes()


def test_a_quality_is_what_was_measured_of_the_bundle(reference_bundle: Path, cli: Cli, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(Path.cwd() / "cache"))
    assert_refused(cli("generate", reference_bundle, "a cat", "--quality", "draft"), "deploy tradeoffs", code=4)
    settings = [Measured(Setting(2, "dpm++"), 10.0, 25.0, 1.0), Measured(Setting(4), 40.0, 40.0, 1.0)]
    presets.save(Bundle.open(reference_bundle).manifest.digest, settings)
    for options, steps in ((("--quality", "draft"), "2"), (("--quality", "high"), "4"), (("--budget-ms", "20"), "2"),
                           (("--quality", "high", "--steps", "3"), "3")):
        assert cli("generate", reference_bundle, "a cat", *options, "-o", "cat.png").code == 0
        with Image.open("cat.png") as image:
            assert image.info["steps"] == steps
    assert_refused(cli("generate", reference_bundle, "a cat", "--budget-ms", "1"), "at least 10")
    assert_refused(cli("generate", reference_bundle, "a cat", "--budget-ms", "9", "--quality", "high"), "both")
