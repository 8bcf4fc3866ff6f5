"""`build --step-cache` and `generate --cache-interval` from the command line, on a model that builds in seconds."""

from __future__ import annotations

from pathlib import Path

from runtimes.bundle import Bundle
from tests.deploy.conftest import Cli


def test_both_entries_are_built_verified_and_used(tiny_model: Path, cli: Cli):
    assert cli("build", tiny_model, "--step-cache", "-o", "cached").code == 0
    bundle = Bundle.open("cached")
    parts = bundle.manifest.components
    assert [s.name for s in parts["unet"].outputs] == ["out_sample", "deep_feature"]
    for name in ("unet", "unet_shallow"):
        parity = parts[name].parity
        assert parity is not None and parity["ok"] and len(parity["shapes"]) == 3
    assert parts["unet_shallow"].parameters < parts["unet"].parameters / 2
    options = ("generate", "cached", "a cat", "--steps", "4", "--seed", "1")
    assert cli(*options, "-o", "plain.png").code == cli(*options, "--cache-interval", "2", "-o", "reused.png").code == 0
    assert Path("plain.png").read_bytes() != Path("reused.png").read_bytes()
