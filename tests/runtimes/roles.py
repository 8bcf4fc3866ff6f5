"""Roles for tests: Stable Diffusion's names with given sizes, and roles with one fact changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from runtimes.bundle.roles import Codec, Coder, Conditioner, Denoiser, GuidanceRole, Process, Roles, TextEncoder


def stable_diffusion(channels: int, factor: int, scaling_factor: float, height: int, width: int, tokens: int) -> Roles:
    """What `exporters.families.stable_diffusion` says of a pipeline with these sizes."""
    codec = Codec(Coder("vae_encoder", "sample", "latent_parameters"), Coder("vae_decoder", "latent_sample", "sample"),
                  channels, factor, scaling_factor, height, width)
    reader = TextEncoder("text_encoder", "tokenizer", tokens, "last_hidden_state", adapter="text_encoder")
    conditioner = Conditioner((reader,), "encoder_hidden_states")
    return Roles(Denoiser("unet", adapter="unet"), codec, conditioner, Process(), GuidanceRole())


def with_fact(value: Any, path: str, fact: Any) -> Any:
    """A copy of roles (or of a part of them) with another value at a path such as "codec.scaling_factor".

    A part of the path may be a key of a mapping, a number of a tuple, or * for each of its elements.
    """
    name, _, rest = path.partition(".")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: with_fact(getattr(value, name), rest, fact) if rest else fact})
    if isinstance(value, tuple):
        return tuple((with_fact(part, rest, fact) if rest else fact) if name in ("*", str(i)) else part
                     for i, part in enumerate(value))
    keys = list(value) if name == "*" else [name]
    return {**value, **{key: with_fact(value[key], rest, fact) if rest else fact for key in keys}}
