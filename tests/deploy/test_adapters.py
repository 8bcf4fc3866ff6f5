"""LoRA, textual inversion and another VAE: merged weights against the formula, images against diffusers, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deploy.building.builder import load_source
from deploy.building.run_build import plan_build
from deploy.core.pass_cache import Cache
from deploy.core.plan import Step
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.parity.reference.torch_sessions import reference_sessions
from deploy.parity.reference.trajectories import assemble_pipeline
from deploy.passes.adapters import parse_embedding
from exporters.source.networks import load_module
from runtimes.adapters.lora_files import parse_lora
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError
from tests.deploy.conftest import Cli, assert_refused
from tests.exporters.family_pipelines import autoencoder, make_pipeline, tiny_decoder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
UNET_PLACES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
               "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
               "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj")
TEXT_PLACE = "text_model.encoder.layers.1.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
Pairs = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "model"
    make_pipeline("sd2").save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(model: Path, tmp_path: Path) -> Callable[..., Bundle]:
    """Options -> the source bundle after load and adapters."""
    number = iter(range(99))

    def get(**options: Any) -> Bundle:
        work = tmp_path / f"work-{next(number)}"
        work.mkdir()
        spec = BuildSpec(model=str(model), **options)
        return load_source(open_origin(spec), spec, Cache(tmp_path / "cache"), work)

    return get


def module(bundle: Bundle, name: str) -> torch.nn.Module:
    component = bundle.component(name)
    library = component.details_as(SourceDetails).library
    return load_module(bundle.file(component.file).parent, library, component.class_name)


def matrices(network: torch.nn.Module, place: str, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight: Any = network.get_submodule(place).weight
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator) * 0.1
    return down, up


def place_of(network: torch.nn.Module, place: str) -> str:
    return place if any(name == place for name, _ in network.named_modules()) else place.removeprefix("text_model.")


def peft_file(unet: Any, text: Any, file: Path, seed: int = 0, rank: int = 2, **metadata: str) -> Pairs:
    """A file as diffusers saves it; gives the matrices by component and place."""
    tensors: Tensors = {}
    pairs: Pairs = {}
    for component, network, places in (("unet", unet, UNET_PLACES), ("text_encoder", text, (TEXT_PLACE,))):
        for i, place in enumerate(places):
            down, up = matrices(network, place_of(network, place), rank, seed + i)
            tensors[f"{component}.{place}.lora_A.weight"], tensors[f"{component}.{place}.lora_B.weight"] = down, up
            pairs[component, place_of(network, place)] = down, up
    save_file(tensors, file, metadata)
    return pairs


def kohya_file(unet: Any, text: Any, file: Path, seed: int = 0) -> Pairs:
    """A file as kohya's scripts save it, with a convolution, rank 2, alpha 1; gives what `peft_file` gives."""
    tensors: Tensors = {}
    pairs: Pairs = {}
    places = [("unet", "lora_unet_", unet, p) for p in (*UNET_PLACES, "down_blocks.0.resnets.0.conv1")]
    # diffusers knows the format of a text encoder's part by the output projection, which kohya's files always have.
    places += [("text_encoder", "lora_te_", text, p) for p in (TEXT_PLACE, TEXT_PLACE.replace("q_proj", "out_proj"))]
    for i, (component, prefix, network, place) in enumerate(places):
        down, up = matrices(network, place_of(network, place), 2, seed + i)
        key = prefix + place.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        pairs[component, place_of(network, place)] = down, up
    save_file(tensors, file)
    return pairs


def assert_merged(before: Bundle, after: Bundle, wanted: dict[tuple[str, str], torch.Tensor]) -> None:
    """Exactly these weights changed, by exactly this much."""
    for component in ("unet", "text_encoder"):
        old, new = (dict(module(b, component).named_parameters()) for b in (before, after))
        for name, weight in new.items():
            delta = wanted.get((component, name.removesuffix(".weight")))
            expected = old[name] if delta is None else old[name] + delta.reshape(old[name].shape)
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_two_loras_with_scales_are_merged_by_the_formula(loaded: Callable[..., Bundle], tmp_path: Path) -> None:
    plain = loaded()
    unet, text = module(plain, "unet"), module(plain, "text_encoder")
    one = peft_file(unet, text, tmp_path / "one.safetensors", 0)
    stated = json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.r": 4, "text_encoder.lora_alpha": 8})
    two = peft_file(unet, text, tmp_path / "two.safetensors", 50, rank=4, lora_adapter_metadata=stated)
    after = loaded(lora=(str(tmp_path / "one.safetensors"), f"{tmp_path}/two.safetensors:0.5"))
    scales = {"unet": 0.5 * 2 / 4, "text_encoder": 0.5 * 8 / 4}
    assert_merged(plain, after, {key: up @ down + scales[key[0]] * two[key][1] @ two[key][0]
                                 for key, (down, up) in one.items()})
    record = next(p for p in after.manifest.passes if p.name == "adapters").config["lora"]
    assert [(entry["file"], entry["scale"]) for entry in record] == [("one.safetensors", 1.0), ("two.safetensors", 0.5)]
    assert str(tmp_path) not in json.dumps(record)


def test_kohyas_names_alphas_and_convolutions(loaded: Callable[..., Bundle], tmp_path: Path) -> None:
    plain = loaded()
    pairs = kohya_file(module(plain, "unet"), module(plain, "text_encoder"), tmp_path / "kohya.safetensors")
    wanted = {place: 0.7 * 0.5 * up.flatten(1) @ down.flatten(1) for place, (down, up) in pairs.items()}
    assert_merged(plain, loaded(lora=(f"{tmp_path}/kohya.safetensors:0.7",)), wanted)


def test_the_oldest_diffusers_names(loaded: Callable[..., Bundle], tmp_path: Path) -> None:
    plain = loaded()
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    tensors: Tensors = {}
    for old, new in (("to_q_lora", "to_q"), ("to_out_lora", "to_out.0")):
        down, up = matrices(module(plain, "unet"), f"{block}.{new}", 2, 1)
        tensors |= {f"unet.{block}.processor.{old}.down.weight": down, f"unet.{block}.processor.{old}.up.weight": up}
        wanted["unet", f"{block}.{new}"] = up @ down
    save_file(tensors, tmp_path / "old.safetensors")
    assert_merged(plain, loaded(lora=(str(tmp_path / "old.safetensors"),)), wanted)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two adapters, as intended
@pytest.mark.parametrize("write", [peft_file, kohya_file])
def test_peft_generates_the_same_latents(
    write: Callable[..., Any], model: Path, loaded: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Two LoRAs with scales."""
    import diffusers

    plain = loaded()
    for name, seed in (("one", 0), ("two", 50)):
        write(module(plain, "unet"), module(plain, "text_encoder"), tmp_path / f"{name}.safetensors", seed)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for name in ("one", "two"):
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(["one", "two"], [0.8, 0.3])
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    expected = theirs("a red apple", num_inference_steps=4, latents=torch.from_numpy(noise),
                      output_type="latent").images
    bundle = loaded(lora=(f"{tmp_path}/one.safetensors:0.8", f"{tmp_path}/two.safetensors:0.3"))
    error = relative_l2(generate(bundle, "a red apple", noise), expected.numpy())
    print(f"two LoRAs written by {write.__name__}, merged here and by PEFT: latents differ by {error:.1e}")
    assert error <= 1e-4
    assert relative_l2(generate(plain, "a red apple", noise), expected.numpy()) > 0.01


def generate(bundle: Bundle, prompt: str, noise: np.ndarray) -> np.ndarray:
    pipeline = assemble_pipeline(reference_sessions(bundle), bundle)
    latents: np.ndarray = pipeline(prompt, steps=4, latents=noise, output="latents")
    return latents


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_textual_inversion_generates_as_diffusers_does(model: Path, loaded: Callable[..., Bundle],
                                                       tmp_path: Path) -> None:
    import diffusers

    generator = torch.Generator().manual_seed(3)
    save_file({"<cat-toy>": torch.randn(3, 16, generator=generator)}, tmp_path / "toy.safetensors")
    save_file({"emb_params": torch.randn(1, 16, generator=generator)}, tmp_path / "style.safetensors")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    theirs.load_textual_inversion(tmp_path / "toy.safetensors")
    theirs.load_textual_inversion(tmp_path / "style.safetensors", token="<style>")
    noise, prompt = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32), "a <cat-toy> in <style>"
    expected = theirs(prompt, num_inference_steps=4, latents=torch.from_numpy(noise), output_type="latent").images
    bundle = loaded(embedding=(str(tmp_path / "toy.safetensors"), f"{tmp_path}/style.safetensors:<style>"))
    assert relative_l2(generate(bundle, prompt, noise), expected.numpy()) <= 1e-4
    assert relative_l2(generate(bundle, "a cat toy in style", noise), expected.numpy()) > 0.01
    record = next(p for p in bundle.manifest.passes if p.name == "adapters").config["embedding"]
    assert [(entry["token"], entry["vectors"]) for entry in record] == [("<cat-toy>", 3), ("<style>", 1)]


def test_a_model_whose_tokenizer_knows_more_words_than_its_text_encoder_is_refused(model: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import CLIPTokenizer

    shutil.copytree(model, tmp_path / "model")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1"])
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    spec = BuildSpec(model=str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"the token '<cat-toy>_1' has id .* the text encoder's table only"):
        load_source(open_origin(spec), spec, Cache(tmp_path / "cache"), tmp_path)


def test_a_lora_for_another_architecture_is_refused_by_its_first_key(
    loaded: Callable[..., Bundle], tmp_path: Path
) -> None:
    foreign = "unet.transformer.blocks.0.attn.to_q.lora_A.weight"
    save_file({foreign: torch.ones(2, 4), foreign.replace("_A", "_B"): torch.ones(4, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=re.escape(f"{foreign} fits nothing in the unet")):
        loaded(lora=(str(tmp_path / "f.safetensors"),))
    wide = f"unet.{UNET_PLACES[0]}.lora_A.weight"
    save_file({wide: torch.ones(2, 99), wide.replace("_A", "_B"): torch.ones(99, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        loaded(lora=(str(tmp_path / "w.safetensors"),))


@pytest.mark.parametrize(("name", "tensors", "words"), [
    ("a.safetensors", {"lora_te2_x.lora_down.weight": torch.ones(1, 1)}, "text_encoder_2, which this model does not"),
    ("a.safetensors", {"unet.x.hada_w1_a": torch.ones(1, 1)}, r"unet\.x\.hada_w1_a is not a key of a LoRA"),
    ("a.bin", {}, "pickles can run code"),
    ("missing.safetensors", None, "no such file"),
])
def test_unusable_loras(name: str, tensors: Tensors | None, words: str, model: Path, tmp_path: Path) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / name)
    with pytest.raises(InputError, match=words):
        plan_build(BuildSpec(model=str(model), lora=(str(tmp_path / name),)))


def test_unusable_embeddings(model: Path, loaded: Callable[..., Bundle], tmp_path: Path) -> None:
    (tmp_path / "cat.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"pickles .* can run code"):
        plan_build(BuildSpec(model=str(model), embedding=(str(tmp_path / "cat.pt"),)))
    for name, tensors, words in (("wide", {"<a>": torch.ones(1, 99)}, "99 numbers a vector, the text_encoder 16"),
                                 ("known", {"apple</w>": torch.ones(1, 16)}, "exists already"),
                                 ("nan", {"<b>": torch.full((1, 16), torch.nan)}, "NaN"),
                                 ("two", {"<a>": torch.ones(1, 16), "<b>": torch.ones(1, 16)}, "not an embedding")):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=words):
            loaded(embedding=(str(tmp_path / f"{name}.safetensors"),))


def test_options_are_read() -> None:
    assert parse_lora("/a/b.safetensors") == (Path("/a/b.safetensors"), 1.0)
    assert parse_lora("/a/b.safetensors:-0.5") == (Path("/a/b.safetensors"), -0.5)
    assert parse_embedding("c.safetensors:<x>") == (Path("c.safetensors"), "<x>")
    for text in ("nan", "much", "inf"):
        with pytest.raises(InputError, match="not a number"):
            parse_lora(f"a.safetensors:{text}")


def test_another_vae_takes_the_place_of_the_models_own(
    model: Path, loaded: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "views"))
    tiny_decoder().vae.save_pretrained(tmp_path / "tiny")
    bundle = loaded(vae=str(tmp_path / "tiny"))
    assert bundle.component("vae_decoder").class_name == "AutoencoderTiny"
    assert bundle.manifest.pipeline.codec.scaling_factor == 1.0
    assert loaded().component("vae_decoder").class_name == "AutoencoderKL"
    image = assemble_pipeline(reference_sessions(bundle), bundle)("a cat", steps=2, seed=0)[0]
    assert image.size == (32, 32)
    autoencoder(latent_channels=8).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="in_channels is 4, the VAE has 8 latent channels"):
        loaded(vae=str(tmp_path / "wide"))
    with pytest.raises(InputError, match=r"config\.json is missing"):
        loaded(vae=str(tmp_path / "nothing"))


def test_without_adapters_the_pass_is_skipped(model: Path) -> None:
    planned = {entry.instance.name: entry.planned for entry in plan_build(BuildSpec(model=str(model)))}
    assert not isinstance(planned["adapters"], Step)


@pytest.mark.slow
def test_a_whole_build_with_a_lora_is_verified_against_pytorch_with_it(
    model: Path, loaded: Callable[..., Bundle], tmp_path: Path, cli: Cli
) -> None:
    plain = loaded()
    peft_file(module(plain, "unet"), module(plain, "text_encoder"), tmp_path / "one.safetensors")
    lora = f"{tmp_path}/one.safetensors:0.8"
    shapes = "batch=1:1:2,height=32:32:64,width=32:32:64"
    result = cli("build", model, "--lora", lora, "--shapes", shapes, "-o", "bundle")
    assert result.code == 0, result.err
    assert Bundle.open(Path("bundle")).manifest.verified
    assert cli("verify", "bundle").code == 0
    (tmp_path / "one.safetensors").unlink()
    assert_refused(cli("verify", "bundle"), "no such file")
