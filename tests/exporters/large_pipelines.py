"""Pipelines of published sizes with random weights, written straight to safetensors: `python -m` with a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.exporters.family_pipelines import clip_tokenizer, scheduler

# runwayml/stable-diffusion-v1-5
SD15: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unet": ("diffusers", "UNet2DConditionModel", {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}),
    "vae": ("diffusers", "AutoencoderKL", {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}),
    "text_encoder": ("transformers", "CLIPTextModel", {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": 768}),
}


def write_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 with random float32 weights: 4.3 GB."""
    import diffusers
    import torch
    import transformers
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"],
                             "tokenizer": ["transformers", "CLIPTokenizer"]}
    for name, (library, kind, config) in SD15.items():
        index[name] = [library, kind]
        cls = getattr(libraries[library], kind)
        with init_empty_weights(include_buffers=False):
            empty = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
        generator, tensors = torch.Generator().manual_seed(0), {}
        for key, place in empty.state_dict().items():
            if place.ndim < 2:
                tensors[key] = torch.ones(place.shape) if key.endswith("weight") else torch.zeros(place.shape)
            else:
                tensors[key] = torch.randn(place.shape, generator=generator) * place[0].numel() ** -0.5
        (folder / name).mkdir(parents=True)
        empty.config.save_pretrained(folder / name) if library == "transformers" else empty.save_config(folder / name)
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


if __name__ == "__main__":
    write_sd15(Path(sys.argv[1]))
