"""`build --step-cache` and `generate --cache-interval` from the command line, on a model that builds in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.bundle import Bundle
from tests.deploy.conftest import Cli


@pytest.mark.parametrize(("target", "store"), [
    ("onnxruntime", "components/unet/model.onnx.data"), ("openvino", "components/unet/model.bin"),
])
def test_both_entries_are_built_verified_and_used_and_share_their_weights(
    tiny_model: Path, cli: Cli, target: str, store: str,
) -> None:
    assert cli("build", tiny_model, "--step-cache", "--target", target, "-o", "cached").code == 0
    bundle = Bundle.open("cached")
    parts = bundle.manifest.components
    assert [s.name for s in parts["unet"].outputs] == ["out_sample", "deep_feature"]
    for name in ("unet", "unet_shallow"):
        parity = parts[name].parity
        assert parity is not None and parity["ok"] and len(parity["shapes"]) == 3
    shallow = parts["unet_shallow"]
    assert shallow.parameters < parts["unet"].parameters / 2
    shared = shallow.details["shared_weights"]
    assert shared["with"] == "unet" and shared["file"] == store
    assert shallow.files[store] == parts["unet"].files[store]
    # Nearly all of its weights, in float32, lie in the other's file; what is left is graph and small constants.
    assert 0.9 * 4 * shallow.parameters < shared["bytes"] < parts["unet"].files[store].bytes
    assert shallow.bytes < 0.5 * shared["bytes"] + 200_000
    options = ("generate", "cached", "a cat", "--steps", "4", "--seed", "1")
    assert cli(*options, "-o", "plain.png").code == cli(*options, "--cache-interval", "2", "-o", "reused.png").code == 0
    assert Path("plain.png").read_bytes() != Path("reused.png").read_bytes()
