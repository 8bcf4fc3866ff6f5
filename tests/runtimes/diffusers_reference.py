"""diffusers' own pipelines and ours over the very same small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.pipeline.diffusion import Pipeline
from runtimes.schedulers import SCHEDULERS
from runtimes.text.clip_tokenizer import ClipTokenizer, prepare_tokenizer
from tests.runtimes.fakes import FakeSession, axes, component
from tests.runtimes.roles import stable_diffusion
from tests.runtimes.scheduler_reference import CLASSES
from tests.runtimes.vocabulary import make_vocabulary

# Without dpm-sde: its noise in diffusers is torchsde's, which no generator decides; see test_schedulers.py.
SAMPLERS_OF_BOTH = tuple(name for name in SCHEDULERS if name != "dpm-sde")
TOKENS, WIDTH, CHANNELS, FACTOR = 16, 16, 4, 4
PROMPTS = ["a red apple on the house", "grinning cat, 3d!"]
NEGATIVES = ["blue", "crying dog"]


def make_networks(folder: Path, extra_channels: int = 0) -> dict[str, Any]:
    """Small networks with random weights; with `extra_channels`, a U-Net for inpainting."""
    torch.manual_seed(0)
    vocab, merges = make_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / "theirs")
    prepare_tokenizer(folder / "theirs", folder / "ours")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS + extra_channels, out_channels=CHANNELS, layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), latent_channels=CHANNELS, norm_num_groups=8, sample_size=32,
        scaling_factor=0.35)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 6  # random weights paint grey; the images here must have contrast
        unet.conv_out.weight *= 3
        for layer in unet.modules():
            if isinstance(layer, diffusers.models.attention_processor.Attention) and layer.is_cross_attention:
                layer.to_out[0].weight *= 20  # so that prompts and guidance matter
    for network in (text_encoder, unet, vae):
        network.eval()
    return {"text_encoder": text_encoder, "unet": unet, "vae": vae, "tokenizer": tokenizer}


def reference(networks, kind=StableDiffusionPipeline, prediction="epsilon", scheduler="ddim"):
    config = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                           set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    pipe = kind(**networks, scheduler=config, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)
    config = {"_class_name": "DDIMScheduler", **pipe.scheduler.config}
    if scheduler == "pndm":  # as Stable Diffusion's PNDM configs have it
        config["skip_prk_steps"] = True
    if scheduler != "ddim":
        pipe.scheduler = CLASSES[scheduler].from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, config


def ours(networks, config, folder, batch: int = 8) -> Pipeline:
    """Our pipeline over the same modules."""
    rows, latent = ShapeRange(1, 1, batch), ShapeRange(4, 8, 32)
    vae = networks["vae"]

    def numpy_in(function):
        def run(**feeds):
            with torch.no_grad():
                return function(**{k: torch.from_numpy(np.array(v)) for k, v in feeds.items()}).numpy()
        return run

    def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, dtype, ("batch", *shape))

    hidden, grid = spec("last_hidden_state", TOKENS, WIDTH), ("height", "width")
    parts = {
        "text_encoder": (
            lambda input_ids: networks["text_encoder"](input_ids)[0],
            component((spec("input_ids", TOKENS, dtype="int64"),), (hidden,), {"batch": Axis("prompts", rows)})),
        "unet": (
            lambda sample, timestep, encoder_hidden_states: networks["unet"](
                sample, timestep, encoder_hidden_states).sample,
            component((spec("sample", networks["unet"].config.in_channels, *grid), spec("timestep"),
                       spec("encoder_hidden_states", "sequence", WIDTH)),
                      (spec("out_sample", CHANNELS, *grid),), axes(rows, latent, 2))),
        "vae_encoder": (
            lambda sample: vae.encode(sample).latent_dist.parameters,
            component((spec("sample", 3, *grid),), (spec("latent_parameters", 8, "h", "w"),),
                      axes(rows, ShapeRange(16, 32, 128), 4))),
        "vae_decoder": (
            lambda latent_sample: vae.decode(latent_sample).sample,
            component((spec("latent_sample", CHANNELS, *grid),), (spec("sample", 3, "h", "w"),), axes(rows, latent))),
    }
    sessions = {name: FakeSession(name, part, numpy_in(function)) for name, (function, part) in parts.items()}
    facts = stable_diffusion(CHANNELS, FACTOR, vae.config.scaling_factor, 32, 32, TOKENS)
    return Pipeline(sessions, facts, config, ClipTokenizer.load(folder / "ours", TOKENS))


def generators(seeds) -> list[torch.Generator]:
    """What diffusers takes for a seed per image."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20)))


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.shape == theirs.shape and mine.dtype == np.float32
    assert theirs.std() > 0.05, "an image without contrast proves nothing"
    print(f"{psnr(mine, theirs):.1f} dB")  # seen with `pytest -s -v`
    assert psnr(mine, theirs) >= 60
