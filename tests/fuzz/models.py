"""Small random pipelines of every family, each saved once by diffusers itself; cases link to their files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.exporters.family_pipelines import autoencoder, clip_encoder, clip_tokenizer, conditional_unet, scheduler

TOKENS = 16
_LEVELS_4 = {"block_out_channels": (8, 8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
             "up_block_types": ("UpDecoderBlock2D",) * 4}
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")

# Builds of the networks: what is unlike the plain one, by network.
BUILDS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "factor-8": {"vae": _LEVELS_4},
    "three-levels": {"unet": {"block_out_channels": (16, 16, 32), "down_block_types": _CROSS,
                              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}},
    "two-layers": {"unet": {"layers_per_block": 2, "block_out_channels": (8, 24), "norm_num_groups": 4,
                            "attention_head_dim": [2, 3]}, "vae": {"layers_per_block": 2}},
    "wide": {"unet": {"block_out_channels": (32, 32), "attention_head_dim": 4}},
    "scale-shift": {"unet": {"resnet_time_scale_shift": "scale_shift"}},
    "linear": {"unet": {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}},
    "plain-vae": {"vae": {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}},
    "gelu": {"text": {"hidden_act": "gelu", "num_hidden_layers": 3}},
    "deep-text": {"text": {"num_hidden_layers": 3, "num_attention_heads": 4}},
    "tiny-vae": {"vae": {"tiny": True}},
    "tiny-vae-8": {"vae": {"tiny": True, "levels": 4}},
}
OF_TEXT_MODELS = tuple(BUILDS)


def _vae(build: str, **changes: Any) -> Any:
    options = {**changes, **BUILDS[build].get("vae", {})}
    if not options.pop("tiny", False):
        return autoencoder(**options)
    from diffusers import AutoencoderTiny

    blocks = (1,) * options.pop("levels", 3)
    return AutoencoderTiny(num_encoder_blocks=blocks, num_decoder_blocks=blocks,
                           encoder_block_out_channels=(8,) * len(blocks), decoder_block_out_channels=(8,) * len(blocks))


def _text(build: str, width: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig

    changes = BUILDS[build].get("text", {})
    plain = clip_encoder(clip_tokenizer(), width, projected=projected)
    return type(plain)(CLIPTextConfig(**{**plain.config.to_dict(), **changes})) if changes else plain


def _unet(build: str, context: int, channels: int = 4, **changes: Any) -> Any:
    return conditional_unet(context, channels, **{**changes, **BUILDS[build].get("unet", {})})


def _stable_diffusion(build: str, channels: int = 4, **unet: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(build), text_encoder=_text(build, 16), tokenizer=clip_tokenizer(),
        unet=_unet(build, 16, channels, **unet), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def _xl(build: str) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=_vae(build, scaling_factor=0.13025), text_encoder=_text(build, 16), tokenizer=clip_tokenizer(),
        text_encoder_2=_text(build, 24, projected=True), tokenizer_2=clip_tokenizer(),
        unet=_unet(build, 40, addition_embed_type="text_time", addition_time_embed_dim=8,
                   projection_class_embeddings_input_dim=24 + 8 * 6), scheduler=scheduler(), add_watermarker=False)


def _refiner(build: str) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(
        vae=_vae(build, scaling_factor=0.13025), text_encoder=None, tokenizer=None,
        text_encoder_2=_text(build, 24, projected=True), tokenizer_2=clip_tokenizer(),
        unet=_unet(build, 24, addition_embed_type="text_time", addition_time_embed_dim=8,
                   projection_class_embeddings_input_dim=24 + 8 * 5),
        scheduler=scheduler(), requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
        add_watermarker=False)


def _family(name: str) -> Callable[[str], Any]:
    from tests.exporters.family_pipelines import PIPELINES

    return lambda build: PIPELINES[name]()


# kind -> (how it is made, the mode-neutral class of its family, builds that it comes in)
KINDS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "sd": (_stable_diffusion, OF_TEXT_MODELS),
    "sd2": (lambda build: _stable_diffusion(build, use_linear_projection=True, upcast_attention=True), OF_TEXT_MODELS),
    "inpaint": (lambda build: _stable_diffusion(build, 9), OF_TEXT_MODELS),
    "xl": (_xl, OF_TEXT_MODELS),
    "refiner": (_refiner, OF_TEXT_MODELS),
    "ldm": (lambda build: _family("ldm")(build), ("plain",)),
    "ldm-text": (lambda build: _family("ldm-text")(build), ("plain",)),
}


@cache
def root() -> Path:
    """Scratch of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="ldm-fuzz-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []


@cache
def base(kind: str, build: str) -> Path:
    """The folder of a pipeline; read-only for all cases."""
    import torch

    from exporters.quiet import quiet

    folder = root() / "bases" / f"{kind}-{build}"
    torch.manual_seed(sum(map(ord, kind + build)))
    with quiet():
        prepared(KINDS[kind][0](build)).save_pretrained(folder)
    return folder


@cache
def other_vae(build: str) -> Path:
    """The folder of another autoencoder, for `vae=`."""
    import torch

    from exporters.quiet import quiet

    folder = root() / "vaes" / build
    torch.manual_seed(77)
    with quiet():
        vae = _vae(build, scaling_factor=0.3)
        _add_contrast(vae)
        vae.save_pretrained(folder)
    return folder


def prepared(pipe: Any) -> Any:
    """Weights in which prompts, sizes and guidance matter and images have contrast."""
    import torch
    from diffusers.models.attention_processor import Attention

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # LDMBert has dropout
    vae = pipe.vae if hasattr(pipe, "vae") else pipe.vqvae
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 3
        for layer in pipe.unet.modules():
            if isinstance(layer, Attention) and layer.is_cross_attention:
                layer.to_out[0].weight *= 20
        if getattr(pipe.unet, "add_embedding", None) is not None:
            pipe.unet.add_embedding.linear_2.weight *= 5
        if hasattr(vae, "quantize"):
            vae.quantize.embedding.weight.normal_()
    _add_contrast(vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _add_contrast(vae: Any) -> None:
    import torch

    with torch.no_grad():
        if hasattr(vae.decoder, "conv_out"):
            vae.decoder.conv_out.weight *= 6
        else:  # AutoencoderTiny
            vae.decoder.layers[-1].weight *= 6
