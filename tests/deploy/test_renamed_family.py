"""No pass, gate or sampling loop knows a network by name: a family of this test's own goes through all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from deploy.building.choose import run_build
from deploy.core.spec import BuildSpec
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Manifest
from tests.deploy import renamed_family as renamed
from tests.deploy.conftest import Cli

# diffusers 0.42 hands tensors to numpy functions
pytestmark = [pytest.mark.usefixtures("one_thread", "own_cache"),
              pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
NAMES = sorted(renamed.NAMES.values())


@pytest.fixture(autouse=True)
def family() -> Iterator[None]:
    with renamed.registered():
        yield


@pytest.fixture
def build(tiny_model: Path, tmp_path: Path) -> Any:
    def made(**options: Any) -> Bundle:
        return run_build(BuildSpec(model=str(tiny_model), **options), tmp_path / "b").bundle

    return made


def assert_proven(manifest: Manifest, names: list[str] = NAMES) -> None:
    assert sorted(manifest.components) == names and manifest.family == "renamed"
    assert manifest.parity is not None and manifest.parity["ok"] and not manifest.parity["unverified"]
    assert all(part.parity is not None and part.parity["ok"] for part in manifest.components.values())


def test_it_equals_diffusers_and_generates_from_text_image_and_mask(build: Any, tmp_path: Path, cli: Cli) -> None:
    bundle: Bundle = build(verify="quick")
    assert_proven(bundle.manifest)
    assert bundle.manifest.parity is not None
    upstream = bundle.manifest.parity["upstream"]
    assert all(upstream[level]["ok"] and not upstream[level]["unverified"] for level in ("weights", "feeds", "images"))
    for name, inputs in renamed.INPUTS.items():
        part = bundle.component(renamed.NAMES[name])
        graph = onnx.load(bundle.file(part.file), load_external_data=False).graph
        assert tuple(value.name for value in graph.input) == inputs == tuple(spec.name for spec in part.inputs)
        assert tuple(value.name for value in graph.output) == renamed.OUTPUTS[name]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    image, mask = ("--image", tmp_path / "red.png"), ("--mask", tmp_path / "mask.png")
    for given in ((), image, (*image, *mask)):
        run = cli("generate", bundle.path, "a cat", *given, "--steps", "2", "-o", tmp_path / "out.png")
        assert run.code == 0, run
    assert cli("inspect", bundle.path).code == cli("bench", bundle.path, "--steps", "1", "--runs", "1").code == 0
