"""Stable Diffusion 1.5 with its published configs and random weights, written straight to safetensors: 4.3 GB.

    python -m tests.deploy.real_size /tmp/sd15
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploy.reference_model import WEIGHTS

TOKENS = 77
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
    "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu", "center_input_sample": False,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "flip_sin_to_cos": True, "freq_shift": 0,
}
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu", "projection_dim": 768, "layer_norm_eps": 1e-05, "bos_token_id": 0, "eos_token_id": 2,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}


def write_stable_diffusion(folder: Path, dtype: str = "float32") -> Path:
    """The whole pipeline; the tokenizer is the reference model's, whose ids are a part of CLIP's range."""
    for name, config, file in (("unet", UNET, "diffusion_pytorch_model"), ("vae", VAE, "diffusion_pytorch_model"),
                               ("text_encoder", TEXT_ENCODER, "model")):
        library, class_name = INDEX[name]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        write_random(folder / name / f"{file}.safetensors", shapes_of(library, class_name, config), dtype)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    shutil.copytree(WEIGHTS / "tokenizer", folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": TOKENS}))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def shapes_of(library: str, class_name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights; nothing is allocated."""
    import importlib

    import torch

    kind: Any = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        module = kind.from_config(config) if library == "diffusers" else kind(kind.config_class.from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def write_random(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Weights that keep the size of what flows through: norms 1, biases 0, the rest N(0, 1 / fan-in)."""
    kind, size = {"float32": ("F32", 4), "float16": ("F16", 2)}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) > 1:
                values = random.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)
            else:
                values = np.full(shape, name.endswith("weight"), np.float32)
            stream.write(values.astype(dtype).tobytes())


if __name__ == "__main__":
    write_stable_diffusion(Path(sys.argv[1]), *sys.argv[2:])
