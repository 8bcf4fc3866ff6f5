"""`deploy.build`: the command line's words from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import deploy
import runtimes
from runtimes.errors import InputError


def test_build_and_load_are_enough_to_generate(tiny_model: Path, build_cache: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(build_cache))
    bundle = deploy.build(tiny_model, target="onnxruntime", precision="fp32", output=tmp_path / "bundle")
    assert bundle.path == tmp_path / "bundle" and bundle.manifest.verified
    assert len(runtimes.load(bundle)("a cat", steps=1, seed=0)) == 1


def test_an_unknown_option_names_the_nearest_one(tiny_model: Path):
    with pytest.raises(InputError, match="did you mean precision"):
        deploy.build(tiny_model, precison="fp16")
