"""A LoRA that is an input of the graphs: equal to the merged one, replaced without a build, refused where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import runtimes
from deploy.building.builder import load_source
from deploy.building.run_build import run_build
from deploy.core.pass_cache import Cache
from deploy.core.spec import BuildSpec, make_spec
from deploy.model.source_bundle import open_origin
from deploy.parity.reference.torch_sessions import reference_sessions
from deploy.parity.reference.trajectories import assemble_pipeline
from exporters.source.networks import load_module
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline
from tests.deploy.conftest import Cli, assert_refused
from tests.exporters.family_pipelines import make_pipeline

SHAPES = {"batch": "1:1:1", "height": "32:32:64", "width": "32:32:64"}
PLACES = {
    "unet": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1",
             "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "mid_block.resnets.0.time_emb_proj",
             "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"),
    "text_encoder": ("text_model.encoder.layers.1.self_attn.q_proj",),
}
NOISE = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swap") / "model"
    make_pipeline("sd2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A file in PEFT's format, for matrices alone or convolutions too: seed, rank -> path."""
    folder = tmp_path_factory.mktemp("loras")

    def write(seed: int, rank: int = 2, kind: str = "all") -> str:
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for name in PLACES:
            network = load_module(model / name, *{"unet": ("diffusers", "UNet2DConditionModel"),
                                                  "text_encoder": ("transformers", "CLIPTextModel")}[name])
            for place in PLACES[name]:
                known = dict(network.named_modules())
                weight: Any = known[place if place in known else place.removeprefix("text_model.")].weight
                if weight.ndim > 2 and kind == "matrices":
                    continue
                down = torch.randn(rank, *weight.shape[1:], generator=generator)
                up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator) * 0.1
                tensors |= {f"{name}.{place}.lora_A.weight": down, f"{name}.{place}.lora_B.weight": up}
        file = folder / f"{seed}-{rank}-{kind}.safetensors"
        save_file(tensors, file)
        return str(file)

    return write


def built(model: Path, cache: Path, out: Path, *loras: str, **options: Any) -> Bundle:
    spec = make_spec({"model": str(model), "shapes": SHAPES, "lora": loras, "verify": "no", **options})
    return run_build(spec, out, cache_root=cache).bundle


@pytest.fixture(scope="module")
def swappable(
    model: Path, lora: Callable[..., str], build_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Built with one LoRA, compared with PyTorch that has it merged."""
    return built(model, build_cache, tmp_path_factory.mktemp("bundle") / "b", f"{lora(0)}:0.8", lora_mode="swap",
                 verify="components")


@pytest.fixture(scope="module")
def pytorch(model: Path, build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pipeline]:
    """The source model by PyTorch, with these LoRAs merged into its weights."""

    def get(*loras: str) -> Pipeline:
        spec = make_spec({"model": str(model), "lora": loras})
        work = tmp_path_factory.mktemp("merged")
        source = load_source(open_origin(spec), spec, Cache(build_cache), work)
        return assemble_pipeline(reference_sessions(source), source)

    return get


def generate(pipeline: Pipeline) -> np.ndarray:
    latents: np.ndarray = pipeline("a red apple", steps=4, latents=NOISE, output="latents")
    return latents


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_its_parity_is_with_the_merged_network_and_the_manifest_says_swap(swappable: Bundle) -> None:
    manifest = swappable.manifest
    parity = manifest.parity
    assert parity is not None and parity["ok"]
    assert {"unet", "text_encoder"} <= set(parity["components"])
    record = next(p for p in manifest.passes if p.name == "adapters").config
    assert record["lora_mode"] == "swap" and record["lora"][0]["scale"] == 0.8
    inputs = manifest.components["unet"].details.lora
    assert inputs is not None and set(inputs.targets) == set(PLACES["unet"])
    assert "lora/unet.safetensors" in manifest.files
    assert [spec.name for spec in manifest.components["unet"].inputs] == ["sample", "timestep", "encoder_hidden_states"]


def test_another_lora_in_its_place_generates_as_if_that_one_had_been_merged(
    swappable: Bundle, pytorch: Callable[..., Pipeline], lora: Callable[..., str]
) -> None:
    """Two at once, of another rank, with scales of their own."""
    others = f"{lora(7, 3)}:0.5", f"{lora(9, 1)}:-0.3"
    merged = generate(pytorch(*others))
    assert relative_l2(generate(runtimes.load(swappable, lora=others)), merged) <= 1e-5
    assert relative_l2(generate(runtimes.load(swappable)), merged) > 1e-2


def test_none_is_the_model_itself(swappable: Bundle, pytorch: Callable[..., Pipeline]) -> None:
    assert relative_l2(generate(runtimes.load(swappable, lora=("none",))), generate(pytorch())) <= 1e-5


def test_openvino_takes_matrices_and_refuses_convolutions(
    model: Path, pytorch: Callable[..., Pipeline], lora: Callable[..., str], build_cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match=r"conv1.* changes a convolution; OpenVINO"):
        built(model, build_cache, tmp_path / "no", lora(0), lora_mode="swap", target="openvino")
    first, other = (lora(seed, rank, "matrices") for seed, rank in ((0, 2), (7, 3)))
    bundle = built(model, build_cache, tmp_path / "ov", first, lora_mode="swap", target="openvino")
    assert relative_l2(generate(runtimes.load(bundle, lora=(other,))), generate(pytorch(other))) <= 1e-4


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft_generates_the_same(swappable: Bundle, model: Path, lora: Callable[..., str]) -> None:
    import diffusers

    file = Path(lora(7, 3))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name="one")
    theirs.set_adapters(["one"], [0.6])
    noise = torch.from_numpy(NOISE)
    expected = theirs("a red apple", num_inference_steps=4, latents=noise, output_type="latent").images
    error = relative_l2(generate(runtimes.load(swappable, lora=(f"{file}:0.6",))), expected.numpy())
    print(f"a LoRA put in another's place, and PEFT: latents differ by {error:.1e}")
    assert error <= 1e-4


def test_generate_takes_files_and_says_what_does_not_fit(
    swappable: Bundle, lora: Callable[..., str], tmp_path: Path, cli: Cli
) -> None:
    from PIL import Image

    generated = cli("generate", swappable.path, "a cat", "--steps", "2", "--lora", f"{lora(7, 3)}:0.5", "-o", "cat.png")
    assert generated.code == 0, generated.err
    with Image.open("cat.png") as image:
        assert image.info["lora"] == "7-3-all.safetensors:0.5"
    save_file({"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.ones(1, 32, 3, 3),
               "unet.mid_block.resnets.0.conv1.lora_B.weight": torch.ones(32, 1, 1, 1)}, tmp_path / "new.safetensors")
    refused = cli("generate", swappable.path, "a cat", "--lora", tmp_path / "new.safetensors")
    assert_refused(refused, "unet.mid_block.resnets.0.conv1.lora_A.weight fits nothing")
    components = {n: replace(c, details=replace(c.details, lora=None))
                  for n, c in swappable.manifest.components.items()}
    other = replace(swappable, manifest=replace(swappable.manifest, components=components))
    with pytest.raises(InputError, match="not built with --lora-mode swap"):
        runtimes.load(other, lora=(lora(0),))


@pytest.mark.parametrize("options", [{"lora": ()}, {"target": "tensorrt-rtx"}, {"precision": "int8"}, {"prune": 0.3}])
def test_what_swap_cannot_be_combined_with_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="swap"):
        make_spec({"lora": ("a.safetensors",), "lora_mode": "swap", **options})
    assert BuildSpec(lora=("a.safetensors",), lora_mode="swap").lora_mode == "swap"
