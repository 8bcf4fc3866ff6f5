"""Our side of the *feeds* level: the bundle's pipeline over a stand-in denoiser and recorded networks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deploy.parity.reference.call_recorder import Recorder
from deploy.parity.reference.trajectories import assemble_pipeline
from deploy.parity.upstream.standin import stand_in
from runtimes.backends.session import Arrays, Session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.pipeline.diffusion import Pipeline

_Array = np.ndarray[Any, Any]


class StandInSession(Session):
    """A denoiser's session that computes `stand_in`."""

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        output = self.component.outputs[0]
        channels = output.shape[1]
        assert isinstance(channels, int)
        return {output.name: stand_in(upstream_names(self.component, feeds), channels)}


def upstream_names(component: Component, feeds: Mapping[str, _Array]) -> dict[str, _Array]:
    """Feeds of a network, shape and dtype as its TensorSpecs say, by the names diffusers has for them."""
    theirs = dict(zip((spec.name for spec in component.inputs), component.takes, strict=True))
    return {theirs[name]: array for name, array in feeds.items()}


class GreySession(Session):
    """A decoder's session that gives grey images of the right size.

    Args:
        factor: pixels per latent.
    """

    def __init__(self, name: str, component: Component, factor: int) -> None:
        super().__init__(name, component)
        self._factor = factor

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        rows, _, height, width = next(iter(feeds.values())).shape
        output = self.component.outputs[0]
        shape = rows, output.shape[1], height * self._factor, width * self._factor
        return {output.name: np.zeros(shape, np.float32)}


def recorded_pipeline(bundle: Bundle, networks: Mapping[str, Session]) -> tuple[Pipeline, dict[str, Recorder]]:
    """The pipeline of a bundle with every network recorded.

    Args:
        bundle: gives facts, tokenizers and scheduler.
        networks: of the source, by PyTorch; denoiser and decoder are not run.

    Returns:
        the pipeline, and the recorder of each network.

    Raises:
        DeployError: what the bundle holds cannot be read.
    """
    roles = bundle.manifest.pipeline.in_one()  # as the stand-in is
    bundle = replace(bundle, manifest=replace(bundle.manifest, pipeline=roles))
    denoiser, decoder = roles.denoiser.component, roles.codec.decoder.component
    stand_ins: dict[str, Session] = {
        denoiser: StandInSession(denoiser, networks[denoiser].component),
        decoder: GreySession(decoder, networks[decoder].component, roles.codec.factor)}
    recorders = {name: Recorder(stand_ins.get(name, session)) for name, session in networks.items()}
    return assemble_pipeline(recorders, bundle), recorders
