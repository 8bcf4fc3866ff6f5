"""Finds groups of coupled channels of a network with torch-pruning, and what each must keep to stay well-formed.

DepGraph (Fang et al. 2023, arXiv:2301.12900): removing an output channel of one layer removes that channel from
every layer it is added to, concatenated with, normalized in or read by. torch-pruning traces those couplings; this
module adds what it cannot know: which groups a diffusers config lets shrink together, and how evenly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from deploy.pruning.shrink.widths import Widths
from runtimes.errors import DeployError, InputError

# The network's own inputs and outputs keep their channels.
_BOUNDARY = ("conv_out", "quant_conv", "post_quant_conv")
_EMBEDDINGS = ("time_embedding", "add_embedding", "class_embedding")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of coupled layers that can only go together.

    Attributes:
        layer: name of the layer whose output channels they are.
        group: torch-pruning's record of all layers involved, for all channels.
        level: resolution level whose width decides how many stay.
        factor: channels per channel of that level: 1, 4 (time embedding, feed-forward), 8 (gated feed-forward).
        kind: "stream", "tokens", "attention", "feed-forward" or "time".
        parts: equal runs of channels that must keep equally many: norm groups or heads.
    """

    layer: str
    group: Any
    level: int
    factor: int
    kind: str
    parts: int

    @property
    def width(self) -> int:
        """Number of channels before pruning."""
        return len(self.group[0].idxs)


class Graph:
    """The dependency graph of one network.

    Args:
        module: a wrapped component of `exporters.source.networks.torch_component`; its layers are pruned in place.
        feeds: example inputs in order, any values in float32, with shapes of the smallest size that the network takes.
        widths: levels of the network.
        norm_groups: of its group normalizations.
        where: names the network in messages.

    Raises:
        InputError: a group of layers that no config of diffusers can describe after pruning; names the layer.
    """

    def __init__(self, module: nn.Module, feeds: Sequence[Tensor], widths: Widths, norm_groups: int,
                 where: str) -> None:
        self._widths, self._norm_groups, self._where = widths, norm_groups, where
        self._depth = len(widths.levels)
        fixed = [layer for name, layer in module.named_modules() if name.rpartition(".")[2] in _BOUNDARY
                 or ".encoder_hid_proj" in name]
        with torch.enable_grad():  # it follows autograd's graph
            self._graph = torch_pruning.DependencyGraph()
            self._graph.build_dependency(module, tuple(feeds), output_transform=lambda outputs: outputs[0],
                                         verbose=False)
        found = self._graph.get_all_groups(ignored_layers=fixed, root_module_types=[nn.Conv2d, nn.Linear])
        self.groups = [self._describe(group) for group in found]

    def prune(self, removed: Mapping[str, Sequence[int]]) -> None:
        """Remove channels from every layer of their groups.

        Args:
            removed: layer of a group -> indices of its channels.
        """
        for entry in self.groups:
            dependency = entry.group[0].dep
            if removed.get(entry.layer):
                group = self._graph.get_pruning_group(dependency.target.module, dependency.handler,
                                                      list(removed[entry.layer]))
                if not self._graph.check_pruning_group(group):
                    raise DeployError(f"removing {len(removed[entry.layer])} channels of {entry.layer} empties a layer",
                                      where=self._where, fix="this is a bug of ldm-deploy: report it")
                group.prune()

    def remaining(self, entry: ChannelGroup) -> int:
        """How many channels of a group remain."""
        return self._widths.remaining[entry.level] * entry.factor

    def heads(self, entry: ChannelGroup) -> tuple[int, int]:
        """Attention heads of a group now and after."""
        return self._widths.levels[entry.level].heads, self._widths.heads[entry.level]

    def _describe(self, group: Any) -> ChannelGroup:
        writers = [_name(dep) for dep, _ in group if "out_channels" in dep.handler.__name__
                   and isinstance(dep.target.module, nn.Conv2d | nn.Linear)]
        layer, width = writers[0], len(group[0].idxs)
        if any(part in layer for part in _EMBEDDINGS):
            return self._checked(ChannelGroup(layer, group, 0, width // self._widths.levels[0].width, "time", 1))
        level = _level_of(writers, self._depth)
        if level is None:
            raise InputError(f"{layer} belongs to no resolution level: no config describes it pruned",
                             where=self._where, fix="use prune_blocks or mask instead")
        factor = max(width // self._widths.levels[level].width, 1)
        kind, parts = self._kind(writers, level)
        return self._checked(ChannelGroup(layer, group, level, factor, kind, parts))

    def _kind(self, writers: Sequence[str], level: int) -> tuple[str, int]:
        if any(name.endswith((".to_q", ".to_k", ".to_v")) for name in writers):
            return "attention", self._widths.levels[level].heads
        if any(".ff.net.0" in name for name in writers):
            return "feed-forward", 1
        if any(".transformer_blocks." in name for name in writers):
            return "tokens", 1
        return "stream", self._norm_groups

    def _checked(self, entry: ChannelGroup) -> ChannelGroup:
        expected = self._widths.levels[entry.level].width * entry.factor
        if entry.width != expected or (self.remaining(entry) % entry.parts and entry.kind != "attention"):
            raise InputError(f"{entry.layer} has {entry.width} channels, which do not follow from its level's width",
                             where=self._where, fix="use prune_blocks or mask instead")
        return entry


def _name(dependency: Any) -> str:
    return str(dependency.target.name).partition(" (")[0]


def _level_of(names: Sequence[str], depth: int) -> int | None:
    """Resolution level of layers that write the same channels: 0 is the finest."""
    decoder = any(name.startswith("decoder.") for name in names)
    for name in names:
        if match := re.search(r"(down|up)_blocks\.(\d+)\.", name):
            number = int(match[2])
            return number if match[1] == "down" else depth - 1 - number
        if "mid_block." in name:
            return depth - 1
        if name.endswith("conv_in"):
            return depth - 1 if decoder else 0
    return None
