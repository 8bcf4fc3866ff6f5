"""LoRA files in every published layout, and what diffusers with PEFT makes of them: weights with the LoRA fused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> down, up
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
PLACES = {
    "unet": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
             "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj", "mid_block.attentions.0.proj_in",
             "down_blocks.0.resnets.0.conv1"),
    "text_encoder": ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj",
                     "encoder.layers.0.mlp.fc1"),
}
PLACES["text_encoder_2"] = PLACES["text_encoder"]


def module_of(network: torch.nn.Module, place: str) -> Any:
    """By its name with or without `text_model.`."""
    known = dict(network.named_modules())
    return known.get(place) or known[f"text_model.{place}"]


def pairs(pipe: Any, component: str, places: Sequence[str] = (), ranks: Sequence[int] = (2,), seed: int = 0) -> Pairs:
    """Random matrices for modules, their ranks in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, place in enumerate(places or PLACES[component]):
        shape, rank = module_of(getattr(pipe, component), place).weight.shape, ranks[i % len(ranks)]
        down = torch.randn(rank, *shape[1:], generator=generator)
        found[place] = down, torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.1
    return found


def dotted(component: str, found: Pairs, inner: str = "", down: str = ".lora_A.weight", up: str = ".lora_B.weight",
           name: Callable[[str], str] = str) -> Tensors:
    """Keys of diffusers and PEFT."""
    return {f"{component}.{inner}{name(place)}{ending}": matrix for place, pair in found.items()
            for ending, matrix in zip((down, up), pair, strict=True)}


def kohya(prefix: str, found: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *alphas: Any) -> Tensors:
    """Keys of kohya's scripts; alphas in turn, None for a module without."""
    tensors: Tensors = {}
    for i, (place, (down, up)) in enumerate(found.items()):
        key = prefix + place.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alphas and (alpha := alphas[i % len(alphas)]) is not None:
            tensors[f"{key}.alpha"] = alpha.clone() if isinstance(alpha, torch.Tensor) else torch.tensor(alpha)
    return tensors


def stated(component: str, **config: Any) -> dict[str, Any]:
    """PEFT's config of one component as diffusers writes it into the metadata."""
    return {f"{component}.{key}": value for key, value in
            {"r": 2, "lora_alpha": 2, "target_modules": list(PLACES[component]), **config}.items()}


def write(file: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> Path:
    """A file with metadata as diffusers writes it."""
    strings = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)} if metadata else {})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, strings)
    return file


def copy_of(pipe: Any) -> Any:
    """The same pipeline over networks of its own."""
    parts = {name: copy.deepcopy(part) if name in NETWORKS else part for name, part in pipe.components.items()}
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return type(pipe)(**parts, **options)


def weights_of(pipe: Any) -> Tensors:
    """Every weight of the networks that a LoRA can change, by `component.name`."""
    return {f"{part}.{name}".replace(".base_layer", ""): weight.detach().clone() for part in NETWORKS
            if (network := getattr(pipe, part, None)) is not None
            for name, weight in network.named_parameters() if "lora_" not in name}


def fused_by_diffusers(pipe: Any, loras: Mapping[Path, float]) -> Tensors:
    """Loaded, scaled and fused as diffusers' documentation says."""
    theirs = copy_of(pipe)
    names = []
    for i, file in enumerate(loras):
        theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"n{i}")
        names.append(f"n{i}")
    theirs.set_adapters(names, list(loras.values()))
    theirs.fuse_lora(components=[part for part in NETWORKS if getattr(theirs, part, None) is not None])
    return weights_of(theirs)


def merged_by_us(pipe: Any, loras: Mapping[Path, float]) -> Tensors:
    """Merged as `build --lora` does."""
    from exporters.adapters.lora_merging import merge
    from runtimes.adapters.lora_files import networks_of

    ours = copy_of(pipe)
    for file, scale in loras.items():
        for component in networks_of(file):
            merge(getattr(ours, component), component, file, scale)
    return weights_of(ours)
