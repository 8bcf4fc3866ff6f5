"""Small random-weight Stable Diffusion folders in the layouts of new and old releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENS = 20


def write_pipeline(folder: Path, *, unet: dict[str, Any] | None = None, vae: dict[str, Any] | None = None,
                   latent_channels: int = 4, context: int = 24, prediction: str = "epsilon") -> Path:
    """A StableDiffusionPipeline folder as the installed diffusers and transformers write it."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from exporters.quiet import quiet

    torch.manual_seed(0)
    with quiet():
        UNet2DConditionModel(**{
            "sample_size": 8, "in_channels": latent_channels, "out_channels": latent_channels,
            "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
            "cross_attention_dim": context, "attention_head_dim": 2, "norm_num_groups": 8, **(unet or {}),
        }).save_pretrained(folder / "unet")
        AutoencoderKL(**{
            "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1, "latent_channels": latent_channels, "norm_num_groups": 4, "sample_size": 64,
            **(vae or {}),
        }).save_pretrained(folder / "vae")
        CLIPTextModel(CLIPTextConfig(
            vocab_size=99, hidden_size=context, intermediate_size=2 * context, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=context,
        )).save_pretrained(folder / "text_encoder")
        DDIMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TOKENS}))
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }))
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_weights(file: Path, change: Any) -> None:
    """Rewrite a safetensors file; `change` maps the dict of tensors to a new one."""
    from safetensors.torch import load, save_file

    save_file({k: v.clone().contiguous() for k, v in change(load(file.read_bytes())).items()}, file)


def to_old_layout(folder: Path) -> None:
    """Rename and reshape weights as releases of 2022 wrote them."""
    import torch

    def old_text_encoder(tensors: dict[str, Any]) -> dict[str, Any]:
        renamed = {f"text_model.{key}": value for key, value in tensors.items()}
        renamed["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
        return renamed

    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_vae(tensors: dict[str, Any]) -> dict[str, Any]:
        result = {}
        for key, value in tensors.items():
            for new, old in names.items():
                if f".{new}." in key:
                    key = key.replace(f".{new}.", f".{old}.")
                    value = value[..., None, None] if key.endswith("weight") and old != "query" else value
            result[key] = value
        return result

    edit_weights(folder / "text_encoder" / "model.safetensors", old_text_encoder)
    edit_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", old_vae)
