"""Declares the inputs of a network that takes its LoRA as inputs, and computes their values from any LoRA files.

Several LoRAs become one by concatenation along the rank; modules that a LoRA does not change get zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from runtimes.adapters.lora_files import Array, Factors, networks_of, parse_lora, read_factors
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError

RANK, LARGEST_RANK = "rank", 4096
NONE = "none"  # in place of files: the model without any


def own_file(name: str) -> str:
    """Where a bundle has the LoRA that it was built with, its scales applied, in PEFT's format."""
    return f"lora/{name}.safetensors"


def input_specs(targets: Mapping[str, Sequence[int]]) -> tuple[TensorSpec, ...]:
    """Inputs of a network: for a matrix (in, rank) and (rank, out), for a convolution the weights of two."""
    specs = []
    for module, (out, inner, *kernel) in targets.items():
        down: tuple[int | str, ...] = (RANK, inner, *kernel) if kernel else (inner, RANK)
        up: tuple[int | str, ...] = (out, RANK, *(1 for _ in kernel)) if kernel else (RANK, out)
        specs += [TensorSpec(f"{module}.lora_down", "float32", down), TensorSpec(f"{module}.lora_up", "float32", up)]
    return tuple(specs)


def with_inputs(component: Component) -> Component:
    """The component as its graph is, with the LoRA's inputs, which the pipeline does not feed."""
    own = component.details.lora
    if own is None:
        return component
    axis = Axis("rank of all LoRAs together", ShapeRange(1, own.rank, LARGEST_RANK))
    return replace(component, inputs=(*component.inputs, *input_specs(own.targets)),
                   axes={**component.axes, RANK: axis}, details=replace(component.details, lora=None))


def side_by_side(loras: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Several LoRAs as one, whose rank is the sum of theirs, by module."""
    found: dict[str, Factors] = {}
    for module in sorted({module for lora in loras for module in lora}):
        parts = [lora[module] for lora in loras if module in lora]
        found[module] = Factors(parts[0].key, np.concatenate([p.down.reshape(len(p.down), *parts[0].down.shape[1:])
                                                              for p in parts]),
                                np.concatenate([p.up for p in parts], axis=1))
    return found


def feeds_for(bundle: Bundle, name: str, options: Sequence[str] = ()) -> dict[str, Array]:
    """The values of the LoRA inputs of one component.

    Args:
        bundle: built with `--lora-mode swap`.
        name: of the component.
        options: `FILE[:SCALE]` each, `none`, or nothing for the LoRA that the bundle was built with.

    Returns:
        every input of `input_specs` by name, weights in float32: (in, rank) and (rank, out) of a matrix, (rank, in,
        height, width) and (out, rank, 1, 1) of a convolution.

    Raises:
        InputError: a file is not a LoRA, does not fit, or changes a module that this bundle takes no LoRA for.
    """
    own = bundle.component(name).details.lora
    if own is None:
        raise InputError("it takes no LoRA", where=name, fix="build the bundle with --lora FILE --lora-mode swap")
    roles = bundle.manifest.pipeline
    network = roles.adapter(name)
    # A file is read for the whole network, also where this component is a part of it.
    whole = roles.pieces(roles.denoiser.component)
    parts = [bundle.component(part).details.lora for part in (whole if name in whole else (name,))]
    targets = {module: shape for part in parts if part is not None for module, shape in part.targets.items()}
    if tuple(options) == (NONE,):
        chosen = []
    elif options:
        chosen = [parse_lora(option) for option in options]
    else:
        chosen = [(bundle.file(own_file(roles.adapted(network))), 1.0)]
    factors = side_by_side([read_factors(file, network, scale, targets, own.levels) for file, scale in chosen])
    rank = max((len(found.down) for found in factors.values()), default=1)
    if rank > LARGEST_RANK:
        raise InputError(f"the ranks together are {rank}, at most {LARGEST_RANK}", where="--lora")
    feeds: dict[str, Array] = {}
    for module, shape in own.targets.items():
        out, inner, *kernel = shape
        down, up = np.zeros((rank, inner, *kernel), np.float32), np.zeros((out, rank), np.float32)
        if (found := factors.get(module)) is not None:
            found.delta(tuple(shape), found.key)  # refuses what does not fit
            own_rank = len(found.down)
            down[:own_rank], up[:, :own_rank] = found.down.reshape(own_rank, inner, *kernel), found.up
        feeds[f"{module}.lora_down"] = down if kernel else np.ascontiguousarray(down.T)
        feeds[f"{module}.lora_up"] = up[:, :, None, None] if kernel else np.ascontiguousarray(up.T)
    return feeds


def check_options(bundle: Bundle, options: Sequence[str]) -> None:
    """Refuse LoRAs that the bundle has no inputs for, before anything is loaded.

    Raises:
        InputError: it takes none at all, or none for a component that a file changes.
    """
    roles = bundle.manifest.pipeline
    takes = [name for name, component in bundle.manifest.components.items() if component.details.lora]
    if options and not takes:
        raise InputError("this bundle takes no LoRA: it was not built with --lora-mode swap", where=str(bundle.path),
                         fix="build it with --lora FILE --lora-mode swap, or merge another with --lora FILE")
    for file, _ in (parse_lora(option) for option in options if option != NONE):
        changed = {roles.adapter(name) for name in takes}
        if other := [name for name in networks_of(file) if name not in changed]:
            known = ", ".join(name for name in map(roles.adapted, sorted(changed)) if name)
            raise InputError(f"it changes the {other[0]}, this bundle takes LoRAs for {known} alone",
                             where=str(file), fix="build with a LoRA that changes the same parts, --lora-mode swap")
