"""Structured pruning: removes the channels of least score, for a network that diffusers builds from its config."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploy.pruning.shrink.groups import ChannelGroup, Graph
from deploy.pruning.shrink.widths import AUTOENCODER, UNET, Widths, config_of, pruned_config
from exporters.source.networks import torch_component
from runtimes.bundle.roles import Role
from runtimes.errors import DeployError

Scorer = Callable[[Any], Tensor]
RANK_TOLERANCE = 1e-3
HALVES = {AUTOENCODER: (Role.IMAGE_ENCODER, Role.IMAGE_DECODER), UNET: (Role.DENOISER,)}


def prune_network(network: Any, feeds: Mapping[Role, Sequence[Tensor]], widths: Widths, scorer: Scorer,
                  where: str) -> Any:
    """A copy of a network with the least important channels of every level removed for real.

    Args:
        network: UNet2DConditionModel or AutoencoderKL, float32; left as it is. The scorer may read its gradients.
        feeds: role of `HALVES` -> example inputs in the order of its wrapper, any values, whose shapes and dtypes it
            takes.
        widths: the shape to reach.
        scorer: a group of torch-pruning -> importance of each of its channels, (N,) float32.
        where: names the network in messages.

    Returns:
        a network of the same class, built from the new config: what `from_pretrained` will build.

    Raises:
        InputError: layers that no config describes after pruning.
    """
    config = config_of(network)
    smaller = copy.deepcopy(network)
    for parameter, copied in zip(network.parameters(), smaller.parameters(), strict=True):
        copied.requires_grad_(True)
        copied.grad = parameter.grad
    for role in HALVES[config["_class_name"]]:
        component = torch_component(role, smaller)
        graph = Graph(component, feeds[role], widths, config["norm_num_groups"], where)
        removed = {}
        for entry in graph.groups:
            removed[entry.layer] = removed_channels(entry, scorer(entry.group), graph)
        graph.prune(removed)
        _rescale_queries(component, graph)
    if config["_class_name"] == UNET:
        _refit_timesteps(smaller, network, widths.remaining[0])
    return _rebuilt(smaller, pruned_config(config, widths), where)


def removed_channels(entry: ChannelGroup, scores: Tensor, graph: Graph) -> list[int]:
    """Indices of the channels with the least scores, as many from each part of the group as from the next.

    Args:
        entry: the group.
        scores: (N,) float32 importance.
        graph: says how many stay.
    """
    remaining = graph.remaining(entry)
    if remaining == entry.width:
        return []
    if entry.kind == "attention":
        chosen = _strongest_in_heads(scores, *graph.heads(entry), remaining)
    elif entry.kind == "feed-forward" and entry.factor > 4:
        # Value and gate of GEGLU are multiplied, so torch-pruning removes the pair when one half is named.
        half = scores.unflatten(0, (2, -1)).sum(0)
        chosen = set(half.topk(remaining // 2).indices.tolist())
        return [i for i in range(len(half)) if i not in chosen]
    else:
        runs = scores.unflatten(0, (entry.parts, -1))
        best = runs.topk(remaining // entry.parts, dim=1).indices + torch.arange(entry.parts)[:, None] * runs.shape[1]
        chosen = set(best.flatten().tolist())
    return [i for i in range(entry.width) if i not in chosen]


def _strongest_in_heads(scores: Tensor, heads: int, heads_after: int, remaining: int) -> set[int]:
    """The strongest heads, and in each of them the strongest dimensions."""
    by_head = scores.unflatten(0, (heads, -1))
    strongest = by_head.sum(1).topk(heads_after).indices.tolist()
    size = by_head.shape[1]
    return {head * size + int(i) for head in strongest for i in by_head[head].topk(remaining // heads_after).indices}


def _rescale_queries(component: nn.Module, graph: Graph) -> None:
    """Attention divides by the root of a head's size, which has changed; the logits should not."""
    for entry in graph.groups:
        if entry.kind == "attention":
            before, after = graph.heads(entry)
            ratio = graph.remaining(entry) / after / (entry.width / before)
            query = component.get_submodule(f"{entry.layer.rpartition('.to_')[0]}.to_q")
            with torch.no_grad():
                for parameter in query.parameters():
                    parameter.mul_(math.sqrt(ratio))


def _refit_timesteps(smaller: Any, network: Any, remaining: int) -> None:
    """Make the first layer of the time embedding read the fewer sinusoids that the narrower config gives it.

    `Timesteps` has as many sinusoids as level 0 has channels, over other frequencies when they are fewer; the least
    squares over all 1000 timesteps gives the weights that bring the layer's outputs closest to the old ones. The slow
    sinusoids hardly differ from a constant: below RANK_TOLERANCE of the largest singular value, weights of millions
    would gain a hundredth and neither fit into float16 nor train.
    """
    from diffusers.models.embeddings import Timesteps

    old, layer = network.time_proj, smaller.time_embedding.linear_1
    if old.num_channels == remaining:
        return
    new = Timesteps(remaining, old.flip_sin_to_cos, old.downscale_freq_shift, old.scale)
    steps = torch.arange(1000)
    ones = torch.ones(len(steps), 1, dtype=torch.float64)
    wanted = torch.cat([old(steps).double(), ones], 1) @ torch.cat([layer.weight, layer.bias[:, None]], 1).double().T
    inputs = torch.cat([new(steps).double(), ones], 1)
    with torch.no_grad():
        fitted = torch.linalg.lstsq(inputs, wanted, rcond=RANK_TOLERANCE, driver="gelsd")
        solution = fitted.solution.float().T
        layer.weight = nn.Parameter(solution[:, :remaining].contiguous())
        layer.bias = nn.Parameter(solution[:, remaining].contiguous())


def _rebuilt(pruned: Any, config: dict[str, Any], where: str) -> Any:
    """The network that diffusers builds from the config, filled with what is left of the weights."""
    network = type(pruned).from_config(config)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    weights = pruned.state_dict()
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        name = next(n for n in sorted(wanted | found) if wanted.get(n) != found.get(n))
        raise DeployError(f"{name} is {found.get(name)} after pruning, its config says {wanted.get(name)}",
                          where=where, fix="this is a bug of ldm-deploy: report it")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
