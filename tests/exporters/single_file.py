"""A pipeline as one file in CompVis' layout: the names that diffusers' single-file loaders translate back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, layers: int, attends: set[tuple[str, int]]) -> str:
    """diffusers' key -> CompVis' key, without its prefix."""
    for new, old in _UNET.items():
        if key.startswith(f"{new}."):
            return key.replace(new, old, 1)
    for new, old in _RESNET.items():
        if ".resnets." in key:
            key = key.replace(f".{new}.", f".{old}.")
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        number = block * (layers + 1) + layer
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if (side, block) in attends else 1}.{rest}"
        place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
    assert match is not None, key
    return f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{match[3]}"


def vae_name(key: str, levels: int) -> str:
    """diffusers' key -> CompVis' key, without its prefix."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, _, rest = key.partition("mid_block.attentions.0.")
        for new, old in _VAE_ATTENTION.items():
            if rest.startswith(f"{new}."):
                return f"{head}mid.attn_1.{rest.replace(new, old, 1)}"
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)


def write_single_file(pipe: Any, file: Path) -> Path:
    """Stable Diffusion 1.x with all its weights in one file."""
    from safetensors.torch import save_file

    config, tensors = pipe.unet.config, {}
    attends = {(side, i) for side, kinds in (("down", config.down_block_types), ("up", config.up_block_types))
               for i, kind in enumerate(kinds) if "CrossAttn" in kind}
    for key, value in pipe.unet.state_dict().items():
        name = unet_name(key, config.layers_per_block, attends)
        tensors[f"model.diffusion_model.{name}"] = value
    for key, value in pipe.vae.state_dict().items():
        name = vae_name(key, len(pipe.vae.config.block_out_channels))
        convolution = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if convolution else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)
    return file
