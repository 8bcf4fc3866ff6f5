"""Single-file checkpoints: the same networks as the diffusers folder they were made from, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deploy.build import plan_build
from deploy.origin import open_origin
from deploy.sources import source_folder
from deploy.spec import BuildSpec
from runtimes.errors import InputError
from tests.exporters.family_pipelines import make_pipeline
from tests.exporters.single_file import write_single_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The single file, a folder of configs without weights, and the whole diffusers folder."""
    folder = tmp_path_factory.mktemp("single")
    pipe = make_pipeline("sd1")
    pipe.save_pretrained(folder / "whole")
    shutil.copytree(folder / "whole", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return write_single_file(pipe, folder / "checkpoint.safetensors"), folder / "configs", folder / "whole"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))


def test_the_weights_are_those_of_the_diffusers_folder(made: tuple[Path, Path, Path]) -> None:
    file, configs, whole = made
    spec = BuildSpec(model=str(file), configs=str(configs))
    origin, expected = open_origin(spec), open_origin(BuildSpec(model=str(whole)))
    assert origin.manifest.source.id == "checkpoint"
    assert origin.manifest.pipeline == expected.manifest.pipeline
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        mine, theirs = (load_file(b.path / f"{name}.safetensors") for b in (origin, expected))
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
        assert all((mine[key] == value).all() for key, value in theirs.items())
    assert source_folder(spec) == origin.path  # made once
    assert str(configs) not in json.dumps(spec.resolved())


def test_what_cannot_be_read_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file, configs, _ = made
    with pytest.raises(InputError, match=r"weights alone .*--configs"):
        plan_build(BuildSpec(model=str(file)))
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="pickles can run code"):
        plan_build(BuildSpec(model=str(tmp_path / "model.ckpt"), configs=str(configs)))
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        plan_build(BuildSpec(model=str(tmp_path / "short.safetensors"), configs=str(configs)))
    tensors = {k: v for k, v in load_file(file).items() if "middle_block" not in k}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(InputError):
        plan_build(BuildSpec(model=str(tmp_path / "part.safetensors"), configs=str(configs)))
