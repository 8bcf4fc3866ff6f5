"""Chooses the widths of a pruned network: levels of a diffusers config, what they can shrink to, the new config.

diffusers builds a network from its config, so a pruned one loads with `from_pretrained` only if the config can say
its shape. A config has one width per resolution level (`block_out_channels`), the heads of each level, and one number
of norm groups; every other width follows from these. So a level shrinks as a whole, in steps of whole norm groups,
and only *which* channels go is free, separately in every group of coupled layers (`groups`). No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.errors import InputError

UNET, AUTOENCODER = "UNet2DConditionModel", "AutoencoderKL"
PRUNABLE = (UNET, AUTOENCODER)


@dataclass(frozen=True)
class Level:
    """One resolution level of a network.

    Attributes:
        width: channels.
        heads: of its attention layers.
        step: widths are multiples of it: every norm group keeps as many channels as the next, and the sinusoids of
            the timestep come in pairs.
        least: two channels for each norm group, or what it has: at a single pixel one channel alone has no variance.
    """

    width: int
    heads: int
    step: int
    least: int

    @property
    def choices(self) -> tuple[int, ...]:
        """Widths it can have, ascending, its own the last."""
        return tuple(w for w in range(self.step, self.width + 1, self.step)
                     if w >= self.least and self.heads_at(w))

    def heads_at(self, width: int) -> int:
        """The most heads that divide a width without growing beyond their size now; 0 if there are none."""
        size = self.width // self.heads
        return next((h for h in range(self.heads, 0, -1) if width % h == 0 and width // h <= size), 0)


@dataclass(frozen=True)
class Widths:
    """The shape that a pruned network is to have.

    Attributes:
        levels: as they are.
        remaining: channels of each level after pruning.
        heads: attention heads of each level after pruning.
    """

    levels: tuple[Level, ...]
    remaining: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def removed(self) -> float:
        """Share of all levels' channels that goes, 0 to 1."""
        return 1 - sum(self.remaining) / sum(level.width for level in self.levels)


def config_of(network: Any) -> dict[str, Any]:
    """The config of a diffusers network, with its class, which diffusers adds only when it saves.

    Without `_use_default_values`: `from_config` would set what is listed there back to its default.
    """
    config = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    return {**config, "_class_name": type(network).__name__}


def levels_of(config: Mapping[str, Any], where: str) -> tuple[Level, ...]:
    """The levels of a network.

    Args:
        config: of a UNet2DConditionModel or AutoencoderKL.
        where: names the network in messages.

    Raises:
        InputError: another class, or one without norm groups.
    """
    if config.get("_class_name") not in PRUNABLE:
        raise InputError(f"{config.get('_class_name')} cannot be pruned", where=where,
                         fix=f"prune one of {', '.join(PRUNABLE)}")
    groups = config.get("norm_num_groups")
    if not isinstance(groups, int):
        raise InputError("it has no norm_num_groups", where=where, fix="prune another component")
    widths = config["block_out_channels"]
    heads = config.get(_heads_key(config)) or 1
    by_level = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
    return tuple(Level(w, h, math.lcm(groups, 2), min(2 * groups, w)) for w, h in zip(widths, by_level, strict=True))


def uniform_widths(levels: Sequence[Level], ratio: float, where: str) -> Widths:
    """Every level loses about the same share of its channels, and all of them together the share asked for.

    Args:
        levels: of the network.
        ratio: share of channels to remove, 0 to 1.
        where: names the network in messages.

    Raises:
        InputError: a level would keep too little, nothing would be removed, or levels would become equal that are not;
            names level and nearest ratio.
    """
    for number, level in enumerate(levels):
        if ratio > _most(level):
            raise InputError(
                f"{ratio:g} of the {level.width} channels of level {number} leaves fewer than the {level.least} that "
                "its norm groups need", where=where, fix=f"prune {_highest(levels):.2f} or less")
    around = [_neighbours(level.choices, level.width * (1 - ratio)) for level in levels]
    total = sum(level.width for level in levels)

    def misfit(remaining: Sequence[int]) -> tuple[float, float]:
        uneven = sum((k / level.width - 1 + ratio) ** 2 for k, level in zip(remaining, levels, strict=True))
        return abs(sum(remaining) - (1 - ratio) * total), uneven

    fitting = [k for k in itertools.product(*around) if fit_together(levels, k)]
    if not fitting:
        raise InputError(f"{ratio:g} would make neighbouring levels equally wide, or equal ones unequal, which changes "
                         "the shortcuts between them", where=where, fix=f"prune {_nearest(levels, ratio):.2f}")
    remaining = min(fitting, key=misfit)
    if all(width == level.width for level, width in zip(levels, remaining, strict=True)):
        raise InputError(f"{ratio:g} removes nothing: channels go in steps of {levels[0].step}", where=where,
                         fix=_lowest_fix(levels))
    return make_widths(levels, remaining)


def _nearest(levels: Sequence[Level], ratio: float) -> float:
    """The share nearest to the one asked for whose widths fit together."""
    total = sum(level.width for level in levels)
    fitting = {sum(k) for k in itertools.product(*(level.choices for level in levels)) if fit_together(levels, k)}
    return min((1 - left / total for left in fitting if left < total), key=lambda share: abs(share - ratio))


def fit_together(levels: Sequence[Level], remaining: Sequence[int]) -> bool:
    """Whether neighbouring levels are as equal or unequal as before.

    Where two are unequal, diffusers puts a convolution into the first shortcut between them; where they are equal,
    none. A pruned network can neither lose nor gain one.
    """
    return all((a.width == b.width) == (x == y)
               for (a, b), (x, y) in zip(itertools.pairwise(levels), itertools.pairwise(remaining), strict=True))


def make_widths(levels: Sequence[Level], remaining: Sequence[int]) -> Widths:
    """The shape with these widths, each one of its level's choices."""
    heads = (level.heads_at(width) for level, width in zip(levels, remaining, strict=True))
    return Widths(tuple(levels), tuple(remaining), tuple(heads))


def pruned_config(config: Mapping[str, Any], widths: Widths) -> dict[str, Any]:
    """The config from which diffusers builds the pruned network."""
    new = {**config, "block_out_channels": list(widths.remaining)}
    if config["_class_name"] == UNET:
        new[_heads_key(config)] = list(widths.heads)
        if config.get("time_embedding_dim"):
            new["time_embedding_dim"] = config["time_embedding_dim"] * widths.remaining[0] // widths.levels[0].width
    return new


def _heads_key(config: Mapping[str, Any]) -> str:
    """diffusers calls the number of heads `attention_head_dim` where `num_attention_heads` is not given."""
    return "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"


def _neighbours(choices: Sequence[int], wanted: float) -> list[int]:
    """The choices next to a number from below and from above."""
    below = [c for c in choices if c <= wanted][-1:]
    return below + [c for c in choices if c > wanted][:1]


def _highest(levels: Sequence[Level]) -> float:
    """The largest ratio, in hundredths, that no level refuses."""
    return math.floor(min(_most(level) for level in levels) * 100) / 100


def _most(level: Level) -> float:
    """The largest share of its channels that a level can lose, to the nearest step; one that cannot shrink stays."""
    return 1.0 if level.width == level.least else 1 - (level.least - level.step / 2) / level.width


def _lowest_fix(levels: Sequence[Level]) -> str:
    """Advice with the smallest ratio, in hundredths, at which one level loses a step."""
    removable = [level.width - level.choices[-2] for level in levels if len(level.choices) > 1]
    if not removable:
        return "this network is as narrow as its norm groups allow"
    return f"prune {math.ceil(min(removable) / sum(level.width for level in levels) * 100) / 100:.2f} or more"
