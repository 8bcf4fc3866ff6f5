"""No pass, gate or sampling loop knows a network by name: a family of this test's own goes through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Manifest
from tests.deploy import renamed_family as renamed
from tests.deploy.conftest import Cli
from tests.deploy.test_pass_prune import LENIENT
from tests.parity.pipelines import write_model

# diffusers 0.42 hands tensors to numpy functions
pytestmark = [pytest.mark.usefixtures("one_thread", "own_cache"),
              pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
NAMES = sorted(renamed.NAMES.values())
Build = Callable[..., Bundle]


@pytest.fixture(autouse=True)
def family() -> Iterator[None]:
    with renamed.registered():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Build:
    def made(**options: Any) -> Bundle:
        return run_build(BuildSpec(model=str(model), **options), tmp_path / "b").bundle

    return made


def assert_proven(manifest: Manifest, passes: Sequence[str], names: Sequence[str] = NAMES) -> None:
    assert sorted(manifest.components) == sorted(names) and manifest.family == "renamed"
    assert [record.name for record in manifest.passes] == ["load", *passes]
    assert manifest.parity is not None and manifest.parity["ok"] and not manifest.parity["unverified"]
    assert all(part.parity is not None and part.parity["ok"] for part in manifest.components.values())


def test_it_equals_diffusers_and_generates_from_text_image_and_mask(build: Build, tmp_path: Path, cli: Cli) -> None:
    bundle = build(verify="quick")
    assert_proven(bundle.manifest, ["export", "optimize"])
    assert bundle.manifest.parity is not None
    levels = bundle.manifest.parity["upstream"]
    assert all(levels[name]["ok"] and not levels[name]["unverified"] for name in ("weights", "feeds", "images"))
    assert levels["images"]["bundle_psnr_db"] and sum(levels["feeds"]["requests"].values()) > 20
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
    assert cli("inspect", bundle.path).code == 0


def test_it_is_quantized_with_ranges_of_its_own_denoising(build: Build) -> None:
    """The graphs are those of the test before, from the cache."""
    bundle = build(precision="int8", calibration_samples=8, verify="components", budget=LENIENT)
    assert_proven(bundle.manifest, ["export", "optimize", "quantize"])
    recipes = {name: part.graph.quantization for name, part in bundle.manifest.components.items()}
    reader, denoiser = recipes[renamed.READER], recipes[renamed.BACKBONE]
    assert reader and reader.recipe == "weight-only", "a text encoder's"
    assert denoiser and denoiser.recipe == "hybrid" and denoiser.layers["w8a8"] > 0 and denoiser.relief


@pytest.mark.parametrize("options", [
    {"precision": "fp16"},
    pytest.param({"target": "openvino"}, marks=pytest.mark.skipif(not util.find_spec("openvino"), reason="optional")),
], ids=["fp16", "openvino"])
def test_it_is_built_in_half_precision_and_for_openvino(options: dict[str, Any], build: Build) -> None:
    bundle = build(verify="components", **options)
    last = "openvino" if "target" in options else "precision"
    assert_proven(bundle.manifest, ["export", "optimize", last])


@pytest.mark.slow
def test_it_takes_a_lora_and_a_step_cache(build: Build, tmp_path: Path, cli: Cli) -> None:
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{place}.lora_A.weight": torch.ones(2, 16), f"{place}.lora_B.weight": torch.ones(16, 2)},
              tmp_path / "a.safetensors")
    shallow = f"{renamed.BACKBONE}_shallow"
    cached = build(verify="components", lora=(str(tmp_path / "a.safetensors"),), step_cache=True)
    assert_proven(cached.manifest, ["adapters", "export", "optimize", "share"], [*NAMES, shallow])
    shared = cached.component(shallow).graph.shared_weights
    assert shared is not None and shared.component == renamed.BACKBONE
    generated = cli("generate", cached.path, "a cat", "--steps", "4", "--cache-interval", "2", "-o", tmp_path / "o.png")
    assert generated.code == 0, generated


@pytest.mark.slow
def test_a_lora_of_it_can_be_swapped(build: Build, tmp_path: Path, cli: Cli) -> None:
    place = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{place}.lora_down.weight": torch.ones(2, 16), f"{place}.lora_up.weight": torch.ones(16, 2)},
              tmp_path / "a.safetensors")
    bundle = build(verify="components", lora=(str(tmp_path / "a.safetensors"),), lora_mode="swap")
    assert_proven(bundle.manifest, ["adapters", "export", "optimize"])
    assert f"lora/{renamed.BACKBONE}.safetensors" in bundle.manifest.files
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, lora in zip(files, ("none", f"{tmp_path / 'a.safetensors'}:2"), strict=True):
        assert cli("generate", bundle.path, "a cat", "--steps", "2", "--lora", lora, "-o", file).code == 0
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("torch_pruning"), reason="optional")
def test_all_of_it_is_pruned_and_recovers(build: Build) -> None:
    manifest = build(prune=0.4, prune_vae=0.25, recover=3, verify="components", budget=LENIENT).manifest
    assert_proven(manifest, ["prune-vae", "prune", "recover", "export", "optimize"])
    for name in (renamed.BACKBONE, renamed.PACKER, renamed.PAINTER):
        details = manifest.components[name].details
        assert details.pruning and details.recovery and details.recovery.steps == 3


@pytest.mark.slow
def test_its_precision_is_searched(build: Build) -> None:
    manifest = build(precision="auto", calibration_samples=8, verify="components", budget=LENIENT).manifest
    summary = manifest.components[renamed.BACKBONE].graph.quantization
    assert summary is not None and summary.recipe == "auto" and summary.chosen


@pytest.mark.slow
@pytest.mark.skipif(not util.find_spec("tensorrt_rtx"), reason="optional")
def test_engines_of_it_are_built(build: Build) -> None:
    manifest = build(target="tensorrt-rtx", verify="components", engine={"capabilities": ("SM89",)}).manifest
    assert all(part.details_as(EngineDetails).profiles for part in manifest.components.values())


@pytest.mark.slow
def test_it_is_served_by_triton_and_diagnosed(build: Build, tmp_path: Path, cli: Cli) -> None:
    bundle = build(verify="no")
    assert cli("export-triton", bundle.path, "-o", tmp_path / "repository").code == 0
    assert (tmp_path / "repository" / f"ldm_{renamed.BACKBONE}").is_dir()
    assert cli("diagnose", bundle.path, "--steps", "4").code in (0, 3), "random weights are wrong, not unreadable"
