"""Declares the step cache's component: the shallow part of a U-Net, fed deep features of an earlier step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exporters.families.declaration import ComponentSpec
from runtimes.bundle.roles import SHALLOW_ENTRY, Entry, Roles
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import InputError

DEEP = "deep_feature"
# What UNet2DConditionModel.forward does before its layers, and `exporters.source.shallow_unet` does not.
_NOT_SHALLOW = ("center_input_sample", "time_embedding_act_fn", "encoder_hid_dim_type", "addition_embed_type")


def with_step_cache(
    specs: Mapping[str, ComponentSpec], roles: Roles, config: Mapping[str, Any], where: str
) -> tuple[dict[str, ComponentSpec], Roles]:
    """The denoiser also giving its deep feature, and a second entry taking it; see `exporters.source.shallow_unet`.

    Args:
        specs: of a family with a U-Net.
        roles: of it.
        config: of the UNet2DConditionModel.
        where: for errors.

    Raises:
        InputError: a U-Net without up blocks of layers and skip connections.
    """
    denoiser, context = roles.denoiser, roles.conditioner.context
    whole = specs[denoiser.component]
    if not config.get("up_block_types"):
        raise InputError("only a U-Net has deep features to reuse", where=where, fix="leave --step-cache out")
    if [spec.name for spec in whole.inputs] != [denoiser.sample, denoiser.timestep, context]:
        raise InputError("the step cache knows U-Nets with a prompt and nothing else", where=where,
                         fix="leave --step-cache out")
    if other := [key for key in _NOT_SHALLOW if config.get(key)]:
        raise InputError(f"the step cache does not know {other[0]}={config[other[0]]!r:.40}", where=where,
                         fix="leave --step-cache out")
    sample, channels = whole.inputs[0], config["block_out_channels"][0]  # the block's width, as of every layer but one
    feature = TensorSpec(DEEP, "float32", (sample.shape[0], channels, *sample.shape[2:]),
                         "input of the last layer of the last up block, without its skip connection")
    name = f"{whole.name}_shallow"
    entries = {SHALLOW_ENTRY: Entry(name, (DEEP,))}
    return {
        **specs,
        whole.name: replace(whole, outputs=(*whole.outputs, feature), gives=whole.gives and (*whole.gives, DEEP)),
        name: replace(whole, name=name, inputs=(*whole.inputs, feature), takes=whole.takes and (*whole.takes, DEEP)),
    }, replace(roles, denoiser=replace(denoiser, entries=entries))


def shallow_weights(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the weights that the second entry uses."""
    block, layers = len(config["block_out_channels"]) - 1, config["layers_per_block"]
    last = layers if isinstance(layers, int) else layers[0]  # up blocks run through the list backwards
    return ("conv_in.", "time_embedding.", f"up_blocks.{block}.resnets.{last}.",
            f"up_blocks.{block}.attentions.{last}.", "conv_norm_out.", "conv_out.")
