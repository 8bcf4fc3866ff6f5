"""`build --step-cache` and `generate --cache-interval` from the command line, on a model that builds in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import to_json
from runtimes.inputs.quality_presets import DRAFT_PSNR_DB
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
    shared = shallow.graph.shared_weights
    assert shared is not None and shared.component == "unet" and shared.file == store
    assert to_json(shallow.details)["shared_weights"]["with"] == "unet"
    assert shallow.files[store] == parts["unet"].files[store]
    # Nearly all of its weights, in float32, lie in the other's file; what is left is graph and small constants.
    assert 0.9 * 4 * shallow.parameters < shared.bytes < parts["unet"].files[store].bytes
    assert shallow.bytes < 0.5 * shared.bytes + 200_000
    options = ("generate", "cached", "a cat", "--steps", "4", "--seed", "1")
    assert cli(*options, "-o", "plain.png").code == cli(*options, "--cache-interval", "2", "-o", "reused.png").code == 0
    assert Path("plain.png").read_bytes() != Path("reused.png").read_bytes()
    assert_its_tradeoffs_are_measured(cli)
    verified = cli("verify", "cached", "--effort", "components", "--json")
    assert verified.code == 0 and json.loads(verified.out)["components"]["unet_shallow"]["ok"], verified.err


def assert_its_tradeoffs_are_measured(cli: Cli) -> None:
    """What reusing features costs is seen, and the presets follow from it."""
    found = json.loads(cli("tradeoffs", "cached", "--images", "2", "--json").out)
    own = {entry["setting"]["cache_interval"]: entry["psnr_db"] for entry in found["settings"]
           if entry["setting"]["scheduler"] is None and entry["setting"]["guidance_interval"] == [0, 1]}
    assert sorted(own) == [1, 2, 3] and own[1] > own[2] > own[3] > 10
    assert all(entry["retrieval"] is None and entry["milliseconds"] > 0 for entry in found["settings"])
    high, draft = (found["presets"][quality] for quality in ("high", "draft"))
    assert high["psnr_db"] == max(entry["psnr_db"] for entry in found["settings"])
    assert draft["psnr_db"] >= DRAFT_PSNR_DB or draft == high
    assert cli("generate", "cached", "a cat", "--quality", "draft", "-o", "draft.png").code == 0
    with Image.open("draft.png") as image:
        assert image.info["steps"] == str(draft["setting"]["steps"])
