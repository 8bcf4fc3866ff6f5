"""Removes whole blocks from a U-Net, in the manner of BK-SDM (Kim et al. 2023, arXiv:2305.15798, section 3)."""

from __future__ import annotations

import re
from typing import Any

from deploy.pruning.shrink.widths import UNET, config_of
from runtimes.errors import InputError


def remove_blocks(network: Any, kind: str, where: str) -> Any:
    """A copy of a network without some of its blocks; it loads with diffusers, whose config can describe all of these.

    Args:
        network: UNet2DConditionModel; left as it is.
        kind: "base": one residual block with its attention per down block, two per up block, of those there are the
            first of each down block and the first and last of each up block. "small": also no mid block.
            "tiny": also no innermost level.
        where: names the network in messages.

    Raises:
        InputError: the network has no such block to lose.
    """
    config = config_of(network)
    if config["_class_name"] != UNET:
        raise InputError(f"{config['_class_name']} has no blocks that BK-SDM removes", where=where)
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise InputError(f"layers_per_block is {layers!r}: blocks of different depth cannot be cut", where=where)
    if kind == "base" and layers == 1:
        raise InputError("every down block has one layer already: prune_blocks base removes nothing", where=where,
                         fix="use small")
    new = {**config, "layers_per_block": 1}
    if kind in ("small", "tiny"):
        if network.mid_block is None:
            raise InputError(f"it has no mid block to remove: prune_blocks {kind}", where=where)
        new["mid_block_type"] = None
    if kind == "tiny":
        new = _without_innermost(new, where)
    smaller = type(network).from_config(new)
    depth = len(config["block_out_channels"])
    weights = {}
    for name, value in network.state_dict().items():
        renamed = _renamed(name, layers, depth, kind)
        if renamed is not None:
            weights[renamed] = value
    smaller.load_state_dict(weights)
    return smaller.eval().requires_grad_(False)


def _without_innermost(config: dict[str, Any], where: str) -> dict[str, Any]:
    widths = config["block_out_channels"]
    if len(widths) < 2 or widths[-1] != widths[-2]:
        raise InputError(f"the two innermost levels have {' and '.join(map(str, widths[-2:]))} channels: one cannot "
                         "take the other's place", where=where, fix="use small")
    new = dict(config)
    for key in ("block_out_channels", "down_block_types", "attention_head_dim", "num_attention_heads",
                "cross_attention_dim", "transformer_layers_per_block"):
        if isinstance(config.get(key), list | tuple):
            new[key] = list(config[key])[:-1]
    new["up_block_types"] = list(config["up_block_types"])[1:]
    return new


def _renamed(name: str, layers: int, depth: int, kind: str) -> str | None:
    """The name of a weight in the smaller network, or None if it is gone."""
    if name.startswith("mid_block.") and kind != "base":
        return None
    match = re.match(r"(down|up)_blocks\.(\d+)\.(.*)", name)
    if match is None:
        return name
    side, block, rest = match[1], int(match[2]), match[3]
    if kind == "tiny":
        if block == (depth - 1 if side == "down" else 0):
            return None
        if side == "down" and block == depth - 2 and rest.startswith("downsamplers."):
            return None
        block -= side == "up"
    inner = re.match(r"(resnets|attentions)\.(\d+)\.(.*)", rest)
    if inner is not None:
        numbers = {0: 0} if side == "down" else {0: 0, layers: 1}
        number = numbers.get(int(inner[2]))
        if number is None:
            return None
        rest = f"{inner[1]}.{number}.{inner[3]}"
    return f"{side}_blocks.{block}.{rest}"
