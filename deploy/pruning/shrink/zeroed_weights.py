"""Prunes by zeroing weights, which keeps every shape: the textbook recipe, and 2:4 for sparse tensor cores.

Zeros save nothing by themselves: the file is as large and a dense kernel as slow. They pay where the file is
compressed, and on NVIDIA GPUs from Ampere on with TensorRT's sparse kernels (2:4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

TEXTBOOK_FILTERS, TEXTBOOK_WEIGHTS = 0.3, 0.3


def mask_textbook(network: nn.Module) -> None:
    """30 % of each convolution's filters by L1 norm, 30 % of each linear layer's weights by magnitude; in place.

    `torch.nn.utils.prune`: `ln_structured(n=1, dim=0)` and `l1_unstructured`. Channels stay, as zeros. The network's
    last convolution is pruned too: that is what the recipe says, and one reason why it is no good without training.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            prune.ln_structured(layer, "weight", amount=TEXTBOOK_FILTERS, n=1, dim=0)
        elif isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", amount=TEXTBOOK_WEIGHTS)
    _make_permanent(network)


def mask_two_of_four(network: nn.Module) -> None:
    """Of every four consecutive inputs of a layer the two smallest weights become zero; in place.

    The pattern of sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378): along the input channels, for each
    kernel position apart. Layers whose inputs are not a multiple of four are left dense, as TensorRT leaves them.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.shape[1] % 4 == 0:
            prune.custom_from_mask(layer, "weight", two_of_four(layer.weight))
    _make_permanent(network)


def two_of_four(weight: Tensor) -> Tensor:
    """Weights (O, I, ...) -> mask of the same shape and dtype, 1 for the two largest of every four along I."""
    groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
    mask = torch.zeros_like(groups).scatter(-1, groups.topk(2, dim=-1).indices, 1)
    return mask.flatten(-2).movedim(-1, 1)


def _make_permanent(network: nn.Module) -> None:
    """Multiply the masks into the weights and take them off, so that the network saves and loads as before."""
    for layer in network.modules():
        if prune.is_pruned(layer) and hasattr(layer, "weight_mask"):
            prune.remove(layer, "weight")
    network.requires_grad_(False)
