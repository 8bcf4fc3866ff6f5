"""Loads the original network as a teacher, from a source bundle, with everything that generating with it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploy.pruning.teacher.block_activity import Observed
from deploy.pruning.teacher.denoising_runs import Diffusion, Trajectories
from exporters.source.networks import load_module, torch_component
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import Role
from runtimes.errors import InputError
from runtimes.pipeline.loading import load_tokenizers, scheduler_config


@dataclass(frozen=True)
class Teacher:
    """A denoising network with prompts to generate.

    Attributes:
        network: frozen, float32, on `prompts`' device. observed: the same as a function.
        diffusion: noise schedule and kind of prediction.
        prompts: (N, S, D) float32 embeddings. empty: (S, D) of no prompt.
        shape: (C, H, W) of the latents at the model's own size.
        guidance_scale: that the model is used with.
    """

    network: nn.Module
    observed: Observed
    diffusion: Diffusion
    prompts: Tensor
    empty: Tensor
    shape: tuple[int, int, int]
    guidance_scale: float

    @classmethod
    def load(cls, bundle: Bundle, name: str, prompts: Sequence[str], guidance_scale: float,
             device: str = "cpu") -> Teacher:
        """Read a component of a source bundle and embed the prompts.

        Args:
            bundle: in the format "safetensors", with a text encoder.
            name: of the component that is the teacher.
            prompts: at least one.
            guidance_scale: of its trajectories.
            device: of torch.

        Raises:
            InputError: a network with other inputs than sample, timestep and text, or channels that are not noise.
        """
        component, roles = bundle.component(name), bundle.manifest.pipeline
        inputs, codec = [spec.name for spec in component.inputs], roles.codec
        calls = [roles.denoiser.sample, roles.denoiser.timestep, roles.conditioner.context]
        if inputs != calls or component.inputs[0].shape[1] != codec.latent_channels or len(roles.encoders) != 1:
            raise InputError(f"{name} reads {', '.join(inputs)}: only a sample, a timestep and hidden states of one "
                             "text encoder can be generated with here", where="pruning",
                             fix="prune it with --prune-method l2 and without --recover")
        network = load_source_module(bundle, component).to(device)
        (reader,) = roles.conditioner.encoders
        text = bundle.component(reader.component)
        encoder = torch_component(Role.TEXT_ENCODER, load_source_module(bundle, text), text.gives)
        hidden = [spec.name for spec in text.outputs].index(reader.hidden)
        ids = torch.from_numpy(load_tokenizers(bundle)[0]([*prompts, ""]))
        with torch.no_grad():
            states = torch.cat([encoder(part)[hidden] for part in ids.split(64)]).to(device)
        return cls(network, Observed(network), Diffusion.from_config(scheduler_config(bundle)), states[:-1], states[-1],
                   (codec.latent_channels, codec.height // codec.factor, codec.width // codec.factor), guidance_scale)

    def trajectories(self, size: int, seed: int = 0) -> Trajectories:
        """`size` trajectories at a time."""
        return Trajectories(self.observed, self.diffusion, self.prompts, self.empty, self.shape, self.guidance_scale,
                            size, seed)


def load_source_module(bundle: Bundle, component: Component) -> Any:
    """A component's network, float32, in eval mode, without gradients."""
    library = component.details_as(SourceDetails).library
    return load_module(bundle.file(component.file).parent, library, component.class_name)


def example_feeds(component: Component) -> list[Tensor]:
    """The smallest inputs that a component promises to take, in order, with a fixed seed.

    Each is float32, uniform from 0 to 1, with the shape of its TensorSpec.
    """
    generator = torch.Generator().manual_seed(0)
    feeds = []
    for spec in component.inputs:
        sizes = [d if isinstance(d, int) else _smallest(component, d) for d in spec.shape]
        feeds.append(torch.rand(sizes, generator=generator))
    return feeds


def _smallest(component: Component, axis: str) -> int:
    return component.axes[axis].range.min
