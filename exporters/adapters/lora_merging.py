"""Merges LoRAs into the weights of PyTorch networks. `runtimes.adapters.lora_files` reads the files.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from runtimes.adapters.lora_files import Factors, read_factors


def merge(module: torch.nn.Module, network: str, file: Path, scale: float) -> int:
    """Add a LoRA's part for one network to its float32 weights, in place of the parameters.

    Args:
        module: the network, as `exporters.source.networks.load_module` gives it.
        network: what adapters call it.
        file: the LoRA.
        scale: how much of it.

    Returns:
        number of weights changed.

    Raises:
        InputError: a key that fits nothing in the network, by name or by shape; the first one is named.
    """
    factors = read_factors(file, network, scale, matrices_of(module), levels_of(module))
    add_factors(module, factors, str(file))
    return len(factors)


def add_factors(module: torch.nn.Module, factors: Mapping[str, Factors], where: str) -> None:
    """Add what `runtimes.adapters.lora_files.read_factors` found to a network's weights.

    Raises:
        InputError: one does not fit its weight.
    """
    for name, found in factors.items():
        layer: Any = module.get_submodule(name)
        delta = torch.from_numpy(found.delta(tuple(layer.weight.shape), where))
        layer.weight = torch.nn.Parameter(layer.weight.data + delta, requires_grad=False)


def matrices_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Every module that has a matrix or a convolution -> the shape of its weight. Tables of embeddings are neither."""
    return {name: tuple(layer.weight.shape) for name, layer in module.named_modules()
            if getattr(getattr(layer, "weight", None), "ndim", 0) >= 2 and not isinstance(layer, torch.nn.Embedding)}


def levels_of(module: torch.nn.Module) -> Any:
    """The network's layers_per_block, 2 if it has none."""
    return getattr(module.config, "layers_per_block", 2)


def write_factors(factors: Mapping[str, Factors], network: str, file: Path) -> None:
    """Write them as a LoRA in PEFT's format; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, found in factors.items():
        tensors[f"{network}.{module}.lora_A.weight"] = np.ascontiguousarray(found.down)
        tensors[f"{network}.{module}.lora_B.weight"] = np.ascontiguousarray(found.up)
    save_file(tensors, file)
