"""Maps the module in a LoRA key, once `lora_files` recognised the key, to the network's own name.

Modules may be named as in older releases of diffusers, by kohya, or as in the original U-Net."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

# The original U-Net's modules outside its blocks, `openaimodel.py` of CompVis and Stability -> diffusers'.
_ENDS = {"time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
         "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
         "input_blocks_0_0": "conv_in", "out_2": "conv_out"}
_RESNET = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
           "skip_connection": "conv_shortcut"}


def spellings(modules: Iterable[str]) -> dict[str, str]:
    """Every spelling that files have of a module -> its name in the network.

    With and without `text_model.`, which transformers 5 took out of the text encoders' names, and with underscores
    for dots, as kohya writes.
    """
    names = {}
    for name in modules:
        bare = name.removeprefix("text_model.")
        for spelling in (bare, f"text_model.{bare}"):
            names[spelling] = name
            names[spelling.replace(".", "_")] = name
    return names


def name_of(place: str, names: Mapping[str, str], levels: Any) -> str | None:
    """The network's name of a place in a file, or None.

    Args:
        place: in the file's spelling.
        names: from `spellings`.
        levels: the network's `layers_per_block`, by which the original U-Net counts.
    """
    unet = re.sub(r"\.processor\.to_(q|k|v|out)$", r".to_\1", place)
    text = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", place)
    candidates = (place, unet, f"{unet}.0", text, _ENDS.get(place, ""), from_original(place, levels))
    return next((names[c] for c in candidates if c in names), None)


def from_original(place: str, levels: Any) -> str:
    """A place in the original U-Net's numbering by diffusers' name, with underscores.

    In each level there are layers_per_block layers and a change of size, counted through.
    """
    match = re.match(r"(input|output|middle)_blocks?_(\d+)_?(\d+)?_(.*)", place)
    if match is None:
        return place
    kind, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    if kind == "middle":
        whole = f"{inner}_{rest}" if inner is not None else rest
        return f"mid_block_attentions_0_{whole}" if number == 1 else f"mid_block_resnets_{number // 2}_{_resnet(whole)}"
    side = "down" if kind == "input" else "up"
    block, layer = _block(number - 1 if kind == "input" else number, levels, side)
    if rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    if side == "up" and rest == "conv":
        return f"up_blocks_{block}_upsamplers_0_conv"
    if inner == "1":
        return f"{side}_blocks_{block}_attentions_{layer}_{rest}"
    return f"{side}_blocks_{block}_resnets_{layer}_{_resnet(rest)}"


def _block(position: int, levels: Any, side: str) -> tuple[int, int]:
    """Level and layer in it at a position of one side."""
    if not isinstance(levels, list | tuple):
        return divmod(position, int(levels) + 1)
    starts = [0, *accumulate(int(n) + 1 for n in (levels if side == "down" else reversed(levels)))]
    block = sum(position >= start for start in starts) - 1
    return block, position - starts[block]


def _resnet(name: str) -> str:
    for old, new in _RESNET.items():
        name = name.replace(old, new)
    return name
