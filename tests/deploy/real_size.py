"""Stable Diffusion 1.5 and XL with their published configs and random weights, written straight to safetensors.

    python -m tests.deploy.real_size sd15 /tmp/sd15            # 4.3 GB
    python -m tests.deploy.real_size sdxl /tmp/sdxl float16    # 6.9 GB, as published
    python -m tests.deploy.real_size calibrate '{"bundle": "BUNDLE", "samples": 512}'
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploy.reference_models import WEIGHTS

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
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
XL_UNET = UNET | {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], "addition_embed_type": "text_time",
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
XL_TEXT_ENCODER_2 = TEXT_ENCODER | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280,
}
XL_SCHEDULER = SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading",
    "interpolation_type": "linear", "use_karras_sigmas": False,
}
XL_INDEX = INDEX | {
    "_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "force_zeros_for_empty_prompt": True,
}
SMALL = {"block_out_channels": [32] * 4, "layers_per_block": 1}
# model_index.json, scheduler, and each network's config
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "sd15": (INDEX, SCHEDULER, {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}),
    # SD 1.5's text encoder beside networks that cost nothing
    "sd15-text": (INDEX, SCHEDULER, {"unet": UNET | SMALL, "vae": VAE | SMALL, "text_encoder": TEXT_ENCODER}),
    "sdxl": (XL_INDEX, XL_SCHEDULER, {
        "unet": XL_UNET, "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025}, "text_encoder": TEXT_ENCODER,
        "text_encoder_2": XL_TEXT_ENCODER_2}),
}
_FILES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def write_model(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The whole pipeline; the tokenizers are the reference model's, whose ids are a part of CLIP's range."""
    index, scheduler, configs = MODELS[name]
    for part, config in configs.items():
        library, class_name = index[part]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        write_random(folder / part / f"{_FILES[library]}.safetensors", shapes_of(library, class_name, config), dtype)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for tokenizer in (part for part in index if part.startswith("tokenizer")):
        shutil.copytree(WEIGHTS / "tokenizer", folder / tokenizer)
        file = folder / tokenizer / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": TOKENS}))
    (folder / "model_index.json").write_text(json.dumps(index))
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


def calibrate(bundle_folder: str, samples: int) -> dict[str, int]:
    """Record so many calls of the U-Net at the smallest size and find its ranges: highest resident bytes of each."""
    from dataclasses import replace

    from calibration.graphs.layers import assign, find_layers
    from calibration.integers.ranges import Scheme
    from calibration.recipes.one_graph import Settings, find_ranges
    from deploy.core.pass_costs import measured
    from deploy.core.spec import BuildSpec
    from deploy.quantization.calibration_data import plan_calibration, record_calibration
    from runtimes.bundle.folder import Bundle

    opened = Bundle.open(bundle_folder, check_hashes=False)
    unet = opened.component("unet")
    axes = {name: replace(axis, range=replace(axis.range, opt=axis.range.min)) if name in ("height", "width") else axis
            for name, axis in unet.axes.items()}
    components = {**opened.manifest.components, "unet": replace(unet, axes=axes)}
    small = replace(opened, manifest=replace(opened.manifest, components=components))
    with measured() as recording_cost:
        recording = record_calibration(small, plan_calibration(small.manifest, BuildSpec(
            precision="int8", calibration_samples=samples)))
    graph = small.file(small.component("unet").file)
    with measured() as ranges_cost:
        import onnx_ir as ir

        found, _ = find_ranges(graph, assign(find_layers(ir.load(graph)), "hybrid", ()), Settings(Scheme()),
                               "unet", recording)
    assert found
    return {"model": sum(component.bytes for component in opened.manifest.components.values()),
            "recording": recording_cost.peak_rss_bytes, "ranges": ranges_cost.peak_rss_bytes}


if __name__ == "__main__" and sys.argv[1] == "calibrate":
    asked = json.loads(sys.argv[2])
    print(json.dumps(calibrate(asked["bundle"], asked["samples"])))
elif __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
