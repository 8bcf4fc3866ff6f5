"""Bad input on the command line: one clear line on stderr, the right exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from deploy.reference_models import WEIGHTS
from tests.deploy.conftest import Cli, assert_nothing_left, assert_refused


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the reference model that a test may break."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "model"))


def test_no_such_folder(cli: Cli):
    assert_refused(cli("build", "nowhere"), "nowhere", "no such folder")
    assert_nothing_left(Path.cwd())


def test_a_folder_without_model_index(cli: Cli, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_refused(cli("build", tmp_path / "empty"), "model_index.json")


def test_an_unknown_pipeline_class_names_the_known_ones(cli: Cli, model: Path):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDifusionPipeline"}))
    assert_refused(cli("build", model), "StableDifusionPipeline", "nearest: StableDiffusionPipeline")


def test_a_missing_weight_file(cli: Cli, model: Path):
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(cli("build", model), "unet", "no .safetensors file")


def test_a_truncated_weight_file(cli: Cli, model: Path):
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(cli("build", model), "vae", "truncated")


def test_a_missing_shard(cli: Cli, model: Path):
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))
    assert_refused(cli("build", model), "the shard diffusion_pytorch_model-00001-of-00002.safetensors is missing")


def test_a_config_whose_channels_disagree_with_the_weights_is_named_in_the_models_own_folder(cli: Cli, model: Path):
    file = model / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "block_out_channels": [2 * c for c in config["block_out_channels"]]}))
    assert_refused(cli("build", model), f"{model / 'unet'}: ", "the config asks for")
    assert_nothing_left(Path.cwd())


def test_a_pickle_is_refused_with_the_way_to_convert(cli: Cli, model: Path):
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    assert_refused(cli("build", model), "pickle", "safe_serialization=True")


def test_nan_weights_name_component_and_tensor(cli: Cli, model: Path):
    import torch
    from safetensors.torch import load_file, save_file

    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, file)
    assert_refused(cli("build", model), "unet", "conv_in.weight", "NaN")
    assert_nothing_left(Path.cwd())


def test_an_output_that_exists_and_is_not_a_bundle_is_left_alone(cli: Cli, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("ten years")
    assert_refused(cli("build", "-o", mine), "not a bundle")
    assert (mine / "thesis.txt").read_text() == "ten years"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "depth=1:2:3"), ("depth", "height")),
        (("--shapes", "height=70"), ("70", "multiple")),
        (("--target", "coreml"), ("target",)),
        (("--budget", "psnr=40"), ("psnr", "image_psnr_db")),
        (("--spec", "missing.yaml"), ("missing.yaml",)),
    ],
)
def test_unusable_options(cli: Cli, arguments: tuple[str, ...], words: tuple[str, ...]):
    assert_refused(cli("build", *arguments), *words)


def test_a_dry_run_prints_the_passes_and_writes_nothing(cli: Cli):
    result = cli("build", "--dry-run")
    assert not result.code
    assert all(name in result.out for name in ("load", "export", "optimize"))
    assert_nothing_left(Path.cwd())


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(cli: Cli, model: Path, monkeypatch, tmp_path: Path):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "link", full)
    assert_refused(cli("build", model), "disk is full", code=4)
    assert_nothing_left(Path.cwd())
    for half_done in ("passes", "work"):  # what diffusers says of the model's configs is a whole fact and may stay
        assert_nothing_left(tmp_path / "cache" / half_done)


def test_a_bug_of_ours_is_exit_code_1(cli: Cli, monkeypatch):
    monkeypatch.setattr("deploy.model.source_bundle.open_source", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("build", "--dry-run")


def test_ctrl_c_is_exit_code_130_and_says_what_stays_cached(cli: Cli, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.core.doctor.examine", interrupted)
    result = cli("doctor")
    assert result.code == 130
    assert result.err == "interrupted; finished parts are kept and the next build goes on from them\n"
