"""A diffusers folder as one file in CompVis's layout: the inverse of what `exporters.source.single_file` reads.

Names as in diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py, for any number of levels and layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_OPEN_CLIP = {"embeddings.position_embedding.weight": "positional_embedding",
              "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm.": "ln_final.",
              "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
              ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", ".self_attn.": ".attn."}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipeline: Path, file: Path, kind: str = "sd1") -> Path:
    """`kind`: "sd1" (CLIP), "sd2" (OpenCLIP), "xl" (both)."""
    from safetensors.torch import load, save_file

    def read(name: str, weights: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return (json.loads((pipeline / name / "config.json").read_text()),
                load((pipeline / name / weights).read_bytes()))

    tensors: dict[str, Any] = {}
    config, weights = read("unet", "diffusion_pytorch_model.safetensors")
    names = _unet_blocks(config)
    for key, value in weights.items():
        tensors["model.diffusion_model." + _unet_key(key, names)] = value
    config, weights = read("vae", "diffusion_pytorch_model.safetensors")
    for key, value in weights.items():
        new = _vae_key(key, len(config["block_out_channels"]))
        is_linear = ".attn_1." in new and new.endswith("weight") and ".norm." not in new
        tensors["first_stage_model." + new] = value[..., None, None] if is_linear else value
    first = read("text_encoder", "model.safetensors")[1]
    if kind == "sd2":
        tensors |= _open_clip(first, "cond_stage_model.model.")
    else:
        place = "conditioner.embedders.0" if kind == "xl" else "cond_stage_model"
        for key, value in first.items():
            tensors[f"{place}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    if kind == "xl":
        tensors |= _open_clip(read("text_encoder_2", "model.safetensors")[1], "conditioner.embedders.1.model.")
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    return file


def _unet_blocks(config: dict[str, Any]) -> dict[str, str]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    names = {"mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.0.": "middle_block.0.",
             "mid_block.resnets.1.": "middle_block.2."}
    for i in range(levels):
        for j in range(layers):
            place = (layers + 1) * i + j + 1
            names[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{place}.0."
            names[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{place}.1."
        names[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op."
        crossed = "CrossAttn" in config["up_block_types"][i]
        for j in range(layers + 1):
            place = (layers + 1) * i + j
            names[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{place}.0."
            names[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{place}.1."
        last = (layers + 1) * i + layers
        names[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{last}.{2 if crossed else 1}."
    return names


def _unet_key(key: str, names: dict[str, str]) -> str:
    for new, old in _ENDS.items():
        if key.startswith(new + "."):
            return old + key.removeprefix(new)
    for new, old in names.items():
        if key.startswith(new):
            rest = key.removeprefix(new)
            if ".resnets." in new:
                part, _, kind = rest.rpartition(".")
                rest = f"{_RESNET[part]}.{kind}"
            return old + rest
    raise KeyError(key)


def _open_clip(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    """OpenCLIP's names; query, key and value of a layer are one matrix there."""
    import torch

    found: dict[str, Any] = {}
    for key, value in weights.items():
        new = key.removeprefix("text_model.")
        if new == "text_projection.weight":
            found[prefix + "text_projection"] = value.T
            continue
        for ours, theirs in _OPEN_CLIP.items():
            new = new.replace(ours, theirs)
        head, _, kind = new.rpartition(".")
        if head.endswith((".k_proj", ".v_proj")):
            continue
        if head.endswith(".q_proj"):
            parts = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            new, value = f"{head.removesuffix('.q_proj')}.in_proj_{kind}", torch.cat(parts)
        found[prefix + new] = value
    return found


def _vae_key(key: str, levels: int) -> str:
    for i in range(levels):
        key = key.replace(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.")
        key = key.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.")
    for new, old in (("downsamplers.0.", "downsample."), ("upsamplers.0.", "upsample."),
                     ("mid_block.attentions.0.", "mid.attn_1."), ("mid_block.resnets.0.", "mid.block_1."),
                     ("mid_block.resnets.1.", "mid.block_2."), ("resnets.", "block."),
                     ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")):
        key = key.replace(new, old)
    if ".attn_1." in key:
        for new, old in _VAE_ATTENTION.items():
            key = key.replace(f".attn_1.{new}.", f".attn_1.{old}.")
    return key
