"""The levels that compare with diffusers itself: every family passes, and each thing that is corrupted is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deploy.building.against_diffusers import upstream_of
from deploy.building.builder import load_source
from deploy.core.pass_cache import Cache
from deploy.core.spec import make_spec
from deploy.model.source_bundle import open_origin
from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.levels import Level, compare_bundle_feeds, compare_source, enforce, images_level
from runtimes.bundle.folder import Bundle, link_or_copy
from runtimes.errors import ParityError
from tests.exporters.family_pipelines import PIPELINES, conditional_unet, stable_diffusion, write_pipeline_of
from tests.runtimes.roles import with_fact

Made = tuple[Upstream, Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Made]]:
    """Upstream and source bundle of a family with any options of a build; made once each."""
    made: dict[Any, Made] = {}
    models: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in models:
            models[family] = write_pipeline_of(family, tmp_path_factory.mktemp(family) / "model")
        return models[family]

    def build(family: str, **options: Any) -> Made:
        key = (family, json.dumps(options, default=str, sort_keys=True))
        if key not in made:
            spec, work = make_spec({"model": str(model(family)), **options}), tmp_path_factory.mktemp("source")
            source = load_source(open_origin(spec), spec, Cache(work / "cache"), work)
            made[key] = upstream_of(spec), source
        return made[key]

    build.model = model  # type: ignore[attr-defined]
    yield build


def changed(source: Bundle, out: Path, file: str, change: Callable[[Any], Any]) -> Bundle:
    """A copy of a bundle with one JSON file changed."""
    for name in source.manifest.all_files():
        link_or_copy(source.path / name, out / name)
    content = json.loads((out / file).read_text(encoding="utf-8"))
    (out / file).unlink()
    (out / file).write_text(json.dumps(change(content)), encoding="utf-8")
    return Bundle(out, source.manifest)


def told(level: Level) -> str:
    """The error of a level that differs."""
    with pytest.raises(ParityError) as error:
        enforce({"feeds": level}, "verify")
    assert error.value.exit_code == 3
    assert "likely cause" in error.value.what
    return error.value.what


@pytest.mark.parametrize("family", list(PIPELINES))
def test_every_family_equals_diffusers_in_weights_and_feeds(make, family):
    levels = compare_source(*make(family))
    assert not levels["weights"].different and not levels["weights"].unverified
    assert levels["weights"].figures["tensors"] > 200
    assert not levels["feeds"].different
    assert sum(levels["feeds"].figures["requests"].values()) >= 7
    assert max(levels["feeds"].figures["relative_l2"].values()) < 2e-6


@pytest.mark.parametrize("unet", [
    {"cross_attention_dim": 24, "encoder_hid_dim": 16}, {"cross_attention_dim": [16, 16]},
    {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
], ids=lambda unet: "-".join(unet))
def test_a_unet_that_makes_its_inputs_of_the_prompt_equals_diffusers(tmp_path, monkeypatch, unet):
    monkeypatch.setitem(PIPELINES, "changed", lambda: _with_unet(**unet))
    spec = make_spec({"model": str(write_pipeline_of("changed", tmp_path / "model"))})
    source = load_source(open_origin(spec), spec, Cache(tmp_path / "cache"), tmp_path)
    levels = compare_source(upstream_of(spec), source)
    assert not levels["weights"].different and not levels["feeds"].different
    assert sum(levels["feeds"].figures["requests"].values()) >= 7


def _with_unet(**changes: Any) -> Any:
    pipe = stable_diffusion()
    pipe.register_modules(unet=conditional_unet(**{"context": changes.pop("cross_attention_dim", 16), **changes}))
    return pipe


def test_another_token_id_is_named(make, tmp_path):
    def swapped(content: Any) -> Any:
        vocab = content["model"]["vocab"]
        vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
        return content

    upstream, source = make("sd2")
    said = told(compare_bundle_feeds(upstream, source, changed(source, tmp_path, "tokenizer/tokenizer.json", swapped)))
    assert said.startswith("token ids: ours ") and "tokenizer" in said


@pytest.mark.parametrize(("key", "value", "what"), [
    ("timestep_spacing", "trailing", "timestep at call 1"), ("steps_offset", 0, "timestep at call 1"),
    ("beta_end", 0.0121, "sample at call 2"), ("prediction_type", "epsilon", "sample at call 2"),
    ("_class_name", "PNDMScheduler", "number of calls"), ("clip_sample", True, "sample at call 2"),
])
def test_another_scheduler_key_is_named_by_what_it_changes(make, tmp_path, key, value, what):
    upstream, source = make("sd2")
    bundle = changed(source, tmp_path, "scheduler/scheduler_config.json", lambda config: {**config, key: value})
    assert told(compare_bundle_feeds(upstream, source, bundle)).startswith(what)


@pytest.mark.parametrize(("family", "fact", "value", "what"), [
    ("sd2", "codec.scaling_factor", 0.2, "latents to decode"), ("sd2", "codec.height", 40, "initial sample at call 1"),
    ("xl", "conditioner.empty_negative", "text", "encoder_hidden_states at call 1"),
    ("xl", "conditioner.numbers.time_ids",
     ("original_width", "original_height", "crop_top", "crop_left", "target_height", "target_width"),
     "time_ids at call 1"),
    ("sd2", "conditioner.encoders.0.tokens", 15, "token ids"),
])
def test_another_fact_is_named(make, family, fact, value, what):
    upstream, source = make(family)
    facts = with_fact(source.manifest.pipeline, fact, value)
    bundle = Bundle(source.path, replace(source.manifest, pipeline=facts))
    assert told(compare_bundle_feeds(upstream, source, bundle)).startswith(what)


def test_another_default_of_the_modes_class_is_named(make):
    upstream, source = make("xl")
    roles = with_fact(source.manifest.pipeline, "process.modes.*.strength", 0.5)
    bundle = Bundle(source.path, replace(source.manifest, pipeline=roles))
    assert "number of calls" in told(compare_bundle_feeds(upstream, source, bundle))


def test_an_inverted_mask_is_named(make, monkeypatch):
    from runtimes.codec import pixels

    original = pixels.to_mask
    monkeypatch.setattr("runtimes.inputs.resolved_request.to_mask", lambda *arguments: 1 - original(*arguments))
    upstream, source = make("inpaint")
    said = told(compare_bundle_feeds(upstream, source, source))
    assert said.startswith(("mask at call 1", "images to encode"))


def test_another_guidance_formula_is_named(make, monkeypatch):
    from runtimes.pipeline.guidance import Guidance

    monkeypatch.setattr(Guidance, "combine", lambda self, uncond, cond: cond + np.float32(self.scale) * (cond - uncond))
    upstream, source = make("sd2")
    assert told(compare_bundle_feeds(upstream, source, source)).startswith("sample at call 2")


def test_another_seed_is_named(make, monkeypatch):
    from runtimes.inputs import noise

    original = noise.NormalGenerator.__init__
    monkeypatch.setattr(noise.NormalGenerator, "__init__", lambda self, seed: original(self, seed + 1))
    upstream, source = make("sd2")
    assert told(compare_bundle_feeds(upstream, source, source)).startswith("initial sample at call 1")


def test_what_we_refuse_and_diffusers_runs_is_named(make, tmp_path):
    upstream, source = make("sd2")
    bundle = changed(source, tmp_path, "scheduler/scheduler_config.json",
                     lambda config: {**config, "num_train_timesteps": 3})
    with pytest.raises(ParityError, match="refusal"):
        enforce({"feeds": compare_bundle_feeds(upstream, source, bundle)}, "verify")


def test_a_changed_weight_is_named(make, tmp_path):
    upstream, source = make("sd2")
    for name in source.manifest.all_files():
        link_or_copy(source.path / name, tmp_path / name)
    file = tmp_path / source.component("unet").file
    tensors = load_file(file)
    file.unlink()
    tensors["conv_in.weight"] = tensors["conv_in.weight"].copy()
    tensors["conv_in.weight"].flat[5] += np.float32(1e-6)
    save_file(tensors, file)
    level = compare_source(upstream, Bundle(tmp_path, source.manifest))["weights"]
    assert level.different[0].startswith("unet, conv_in.weight: differs by up to")


@pytest.fixture(scope="module")
def lora(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of U-Net and text encoder as diffusers writes one."""
    random, tensors = np.random.default_rng(0), {}
    places = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (16, 16),
              "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (32, 16),
              "text_encoder.text_model.encoder.layers.0.self_attn.k_proj": (16, 16)}
    for place, (out, inner) in places.items():
        tensors[f"{place}.lora_A.weight"] = random.standard_normal((4, inner)).astype(np.float32)
        tensors[f"{place}.lora_B.weight"] = random.standard_normal((out, 4)).astype(np.float32)
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("mode", ["merge", "swap"])
def test_a_lora_is_what_peft_makes_of_it_merged_or_beside(make, lora, mode):
    levels = compare_source(*make("sd2", lora=(f"{lora}:0.5",), lora_mode=mode))
    assert not levels["weights"].different and not levels["weights"].unverified, levels["weights"]
    assert levels["weights"].figures["adapted"] == 3
    assert not levels["feeds"].different


def test_another_scale_of_a_lora_is_named(make, lora):
    upstream, source = make("sd2", lora=(f"{lora}:0.5",))
    level = compare_source(replace(upstream, loras=((lora, 0.8),)), source)["weights"]
    assert "attn1.to_q.weight: differs" in " ".join(level.different) and "PEFT adds up to" in level.different[0]


def test_embeddings_are_what_diffusers_loads(make, tmp_path_factory):
    file = tmp_path_factory.mktemp("embedding") / "toy.safetensors"
    save_file({"<toy>": np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)}, file)
    levels = compare_source(*make("sd2", embedding=(str(file),)))
    assert not levels["weights"].different and not levels["weights"].unverified, levels["weights"]
    assert not levels["feeds"].different


def test_another_autoencoder_is_the_one_that_diffusers_is_given(make):
    folder = make.model("tiny-decoder") / "vae"
    levels = compare_source(*make("sd2", vae=str(folder)))
    assert not levels["weights"].different and not levels["weights"].unverified, levels["weights"]
    assert not levels["feeds"].different


def test_images_are_judged_by_two_budgets_and_a_refusal_counts():
    level = images_level({"text": 59.9, "mask": 80.0}, {"mask": 24.0}, {"image": "no encoder"}, {}, 25.0)
    assert [text.partition(":")[0] for text in level.different] == ["image", "text", "mask"]
    assert not images_level({"text": 60.0}, {"text": 25.0}, {}, {}, 25.0).different
    assert images_level({"text": float("nan")}, {}, {}, {}, 25.0).different


def test_a_stand_in_feels_every_input_smoothly():
    from deploy.parity.upstream.standin import stand_in

    random = np.random.default_rng(0)
    feeds = {"sample": random.standard_normal((2, 9, 6, 5)), "timestep": np.array([400.0, 400.0]),
             "encoder_hidden_states": random.standard_normal((2, 7, 16)), "time_ids": np.full((2, 6), 64.0)}
    before = stand_in(feeds, 4)
    assert before.shape == (2, 4, 6, 5) and before.dtype == np.float32 and 0.3 < before.std() < 1.5
    for name, values in feeds.items():
        for position in (0, values.size // 2, values.size - 1):
            nudged = values.copy()
            nudged.flat[position] += 0.5
            change = np.abs(stand_in({**feeds, name: nudged}, 4) - before).max()
            assert 1e-5 < change < 0.5, (name, position, change)


def test_a_lora_that_diffusers_misreads_is_unverified_by_name_and_the_rest_is_compared(make, tmp_path_factory):
    random = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for place, shape, alpha in (("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", (16, 16), 2.0),
                                ("mid_block_attentions_0_transformer_blocks_0_attn2_to_v", (32, 16), 4.0)):
        tensors |= {f"lora_unet_{place}.lora_down.weight": random.standard_normal((4, shape[1])).astype(np.float32),
                    f"lora_unet_{place}.lora_up.weight": random.standard_normal((shape[0], 4)).astype(np.float32),
                    f"lora_unet_{place}.alpha": np.array(alpha, np.float32)}
    file = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    save_file(tensors, file)
    weights = compare_source(*make("sd2", lora=(str(file),)))["weights"]
    assert not weights.different and weights.figures["tensors"] > 390
    assert "the most common alpha" in weights.unverified[0]


def test_a_size_of_its_own_that_the_build_has_said_is_no_difference(make):
    upstream, source = make("sd2", shapes={"height": "48:48:64", "width": "48:48:64"})
    assert source.manifest.pipeline.codec.height == 48
    assert not compare_bundle_feeds(upstream, source, source).different


@pytest.mark.parametrize(("name", "keys"), [
    ("DEISMultistepScheduler", {"solver_order": 3}), ("LMSDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3})])
def test_a_sampler_that_loses_digits_is_no_difference(make, tmp_path, name, keys):
    shutil.copytree(make.model("sd2"), tmp_path / "model")
    index, config = tmp_path / "model" / "model_index.json", tmp_path / "model" / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", name]}))
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": name, **keys}))
    spec = make_spec({"model": str(tmp_path / "model")})
    source = load_source(open_origin(spec), spec, Cache(tmp_path / "cache"), tmp_path)
    level = compare_bundle_feeds(upstream_of(spec), source, source)
    assert not level.different and len(level.figures["requests"]) == 6


def test_an_image_of_which_a_mask_leaves_nothing_is_encoded_alike_whatever_the_strides_of_its_tensor(tmp_path: Path):
    """torch 2.13's GroupNorm of channels last, by which the latents of a flat image were 2e-2 off."""
    import torch

    from deploy.parity.upstream.recorded_networks import Calls, Network, autoencoder

    folder = write_pipeline_of("inpaint", tmp_path / "model") / "vae"
    vae = autoencoder(Network(folder, "diffusers", "AutoencoderKL", "vae"), Calls(), 4)
    plain = torch.zeros(1, 3, 256, 256)
    last = torch.zeros(1, 256, 256, 3).permute(0, 3, 1, 2)  # as diffusers makes tensors of images
    assert torch.equal(vae.encode(last).latent_dist.mean, vae.encode(plain).latent_dist.mean)
