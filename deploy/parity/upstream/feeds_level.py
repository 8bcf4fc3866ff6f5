"""Level *feeds*: compares, in every mode and call by call, what diffusers' pipeline and ours feed their networks.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from deploy.parity.metrics import relative_l2
from deploy.parity.reference.call_recorder import Recorder
from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.asked_requests import Asked, plan_requests
from deploy.parity.upstream.diffusers_loading import (
    CannotLoadError,
    check_noise,
    load_pipeline,
    load_words,
    network_of,
    part_of,
    small_encoder,
    source_of,
    upstream_errors,
)
from deploy.parity.upstream.our_side import recorded_pipeline, upstream_names
from deploy.parity.upstream.recorded_networks import Calls, autoencoder, denoiser, text_encoder
from exporters.families import family_of
from exporters.source.diffusers_pipeline import as_loaded, upstream_class
from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import Role
from runtimes.errors import DeployError

Array = np.ndarray[Any, Any]
# Text encoders run in other batches, and the same sums are made in another order: float32 rounding, added up by the
# sampler. What a wrong key of a config does is above 1e-3.
TOLERANCE = 5e-5
# Where a sampler's own sums lose digits, the last bits of torch's logarithms and roots, which differ between processors
# and are not numpy's, become visible (docs/schedulers.md, "How equal").
OF_SAMPLER = {"DEISMultistepScheduler": 5e-3, "LMSDiscreteScheduler": 2e-4, "DPMSolverSinglestepScheduler": 5e-3}
TIMESTEP_TOLERANCE = 1e-3

CAUSES = {
    "token ids": "the tokenizer: its files, added tokens or length",
    "images to encode": "how an image or mask is prepared: size, resampling, transparency",
    "number of calls": "the scheduler's class, or how steps and strength are counted",
    "timestep": "the scheduler's class or config",
    "encoder_hidden_states": "the prompt: which output of the text encoder is read, or an empty negative prompt",
    "text_embeds": "the pooled prompt: which output of the text encoder is read, or an empty negative prompt",
    "time_ids": "sizes, crops or scores",
    "mask": "how the mask is resized and where it is cut into black and white",
    "masked image": "how the masked image is prepared or encoded",
    "initial sample": "seed, image, strength, or the scaling of the initial noise",
    "sample": "guidance or the sampler's step",
    "latents to decode": "the autoencoder's scaling factor or shift, or the sampler's last step",
}


@dataclass(frozen=True)
class Difference:
    """The first thing in which a request's feeds differ.

    Attributes:
        request: its name.
        what: a key of `CAUSES`, or the name of an input.
        call: of the denoiser, counted from 1; 0 for what comes before or after its calls.
        ours, theirs: the values, in words.
    """

    request: str
    what: str
    call: int
    ours: str
    theirs: str

    def __str__(self) -> str:
        at = f" at call {self.call}" if self.call else ""
        cause = CAUSES.get(self.what)
        return (f"{self.what}{at}: ours {self.ours}, diffusers {self.theirs} (request: {self.request})"
                + (f"; likely cause: {cause}" if cause else ""))


@dataclass
class FeedsReport:
    """What was compared.

    Attributes:
        requests: name -> number of denoiser calls that were compared.
        relative_l2: name of an input -> largest relative L2 over all calls.
        different: the first difference of each request that has one.
        unverified: mode -> why nothing could be compared.
    """

    requests: dict[str, int] = field(default_factory=dict)
    relative_l2: dict[str, float] = field(default_factory=dict)
    different: list[Difference] = field(default_factory=list)
    unverified: dict[str, str] = field(default_factory=dict)


def compare_feeds(upstream: Upstream, source: Bundle, bundle: Bundle, networks: Mapping[str, Session]) -> FeedsReport:
    """Send the same requests to both and compare every call.

    Args:
        upstream: the model as its user has it.
        source: the same model after the passes `load` and `adapters`; text encoders and the autoencoder's encoder of
            both sides have its weights.
        bundle: whose roles, tokenizers and scheduler are on trial: the source, or a bundle made from it.
        networks: of the source, by PyTorch.
    """
    report, codec = FeedsReport(), bundle.manifest.pipeline.codec
    sides: dict[str, Theirs] = {}
    moved = _has_moved(upstream, bundle)
    for asked in plan_requests(8 * codec.factor, min(codec.height, codec.width)):
        if asked.mode in report.unverified:
            continue
        if asked.size is None and moved:
            asked = replace(asked, size=(codec.height, codec.width))
        try:
            if asked.mode not in sides:
                sides[asked.mode] = Theirs(upstream, source, asked.mode)
            side = sides[asked.mode]
            asked = asked.fitted(side.parameters)
            theirs = side.run(asked)
        except CannotLoadError as error:
            report.unverified[asked.mode] = str(error)
            continue
        try:
            pipeline, recorders = recorded_pipeline(bundle, networks)  # anew: it remembers prompts
            with _without_remarks():
                pipeline(**asked.to_ours(asked.images(), side.parameters), output="numpy")
        except DeployError as error:
            report.different.append(Difference(asked.name, "refusal", 0, str(error), "runs it"))
            continue
        _compare(report, asked, theirs, _recorded(recorders, source), codec.latent_channels, side.tolerance)
    return report


def _has_moved(upstream: Upstream, bundle: Bundle) -> bool:
    """Whether the bundle cannot make the model's own size; the build has reported it."""
    model = as_loaded(source_of(upstream))
    own = family_of(model.pipeline_class).roles(model).codec
    axes = bundle.component(bundle.manifest.pipeline.denoiser.component).axes
    sides = {"height": own.height // own.factor, "width": own.width // own.factor}
    return any(rows not in axes[name].range or rows % axes[name].multiple for name, rows in sides.items())


class Theirs:
    """diffusers' pipeline for one mode, over networks whose calls are recorded.

    Attributes:
        parameters: that its call has.
        tolerance: relative L2 within which its samples and ours are equal.

    Raises:
        CannotLoadError: diffusers has none of this model, or refuses it.
    """

    def __init__(self, upstream: Upstream, source: Bundle, mode: str) -> None:
        if upstream_class(source_of(upstream), mode) is None:
            raise CannotLoadError("diffusers has no pipeline for it")
        self._calls, parts = Calls(), {}
        roles = source.manifest.pipeline
        for name, component in source.manifest.components.items():
            part, network, role = part_of(component), network_of(source, name), roles.role(name)
            if role is Role.DENOISER:
                parts[part] = denoiser(network, self._calls, roles.codec.latent_channels)
            elif role is Role.TEXT_ENCODER:
                parts[part] = text_encoder(network, self._calls, name)
            elif role in (Role.IMAGE_ENCODER, Role.IMAGE_DECODER):
                parts[part] = autoencoder(network, self._calls, roles.codec.factor)
        self._pipe = load_pipeline(upstream, mode, parts)
        check_noise(self._pipe)
        for reader in roles.conditioner.encoders if upstream.embeddings else ():
            part = part_of(source.component(reader.component))
            load_words(upstream, source, self._pipe, reader, small_encoder(parts[part]))
        self.tolerance = OF_SAMPLER.get(type(self._pipe.scheduler).__name__, TOLERANCE)
        self.parameters = frozenset(inspect.signature(self._pipe.__call__).parameters)

    def run(self, asked: Asked) -> Calls:
        """What one request feeds the networks.

        Raises:
            CannotLoadError: diffusers does not run it.
        """
        self._calls.clear()
        generators = [torch.Generator().manual_seed(asked.seed + i) for i in range(len(asked.prompts))]
        with upstream_errors():
            self._pipe(**asked.to_theirs(asked.images(), generators, self.parameters), output_type="np")
        return self._calls


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence our warnings: a prompt is too long on purpose."""
    logger = logging.getLogger("runtimes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _recorded(recorders: Mapping[str, Recorder], source: Bundle) -> Calls:
    """Our calls in the form of theirs."""
    roles = source.manifest.pipeline
    denoiser = roles.denoiser.component

    def rows(name: str, tensor: str) -> list[Array]:
        return [row for call in recorders[name].calls for row in call[tensor]] if name in recorders else []

    return Calls(
        denoiser=[upstream_names(source.component(denoiser), call) for call in recorders[denoiser].calls],
        text={reader.component: rows(reader.component, reader.ids) for reader in roles.conditioner.encoders},
        encoded=rows(roles.codec.encoder.component, roles.codec.encoder.input),
        decoded=rows(roles.codec.decoder.component, roles.codec.decoder.input))


def _compare(report: FeedsReport, asked: Asked, theirs: Calls, ours: Calls, channels: int, within: float) -> None:
    """Note the figures of one request, up to its first difference."""
    report.requests[asked.name] = len(theirs.denoiser)
    found = _first_difference(report, theirs, ours, channels, within)
    if found is not None:
        what, call, mine, other = found
        report.different.append(Difference(asked.name, what, call, mine, other))


def _first_difference(report: FeedsReport, theirs: Calls, ours: Calls, channels: int, within: float,
                      ) -> _Found | None:
    """In the order in which an error would spread."""
    for name, rows in theirs.text.items():
        if (ids := _unknown_prompt(rows, ours.text.get(name, []))) is not None:
            return "token ids", 0, *ids
    for image in ours.encoded:
        if not any(_close(image, other) for other in theirs.encoded):
            return "images to encode", 0, _shown(image), _shown(*theirs.encoded[:1])
    if len(theirs.denoiser) != len(ours.denoiser):
        return "number of calls", 0, str(len(ours.denoiser)), str(len(theirs.denoiser))
    for number, (mine, other) in enumerate(zip(ours.denoiser, theirs.denoiser, strict=True), 1):
        if (wrong := _different_call(report, mine, other, channels, number, within)) is not None:
            return wrong
    return _different_array(report, "latents to decode", 0, np.stack(ours.decoded), np.stack(theirs.decoded), within)


def _different_call(report: FeedsReport, ours: Mapping[str, Array], theirs: Mapping[str, Array], channels: int,
                    number: int, within: float) -> _Found | None:
    if missing := sorted(set(theirs) ^ set(ours)):
        name = missing[0]
        return name, number, "feeds it" if name in ours else "does not feed it", "feeds it" if name in theirs else "not"
    mine, other = (np.unique(feeds["timestep"].astype(np.float64)) for feeds in (ours, theirs))
    if len(mine) != len(other) or np.abs(mine - other).max() > TIMESTEP_TOLERANCE:
        return "timestep", number, _numbers(mine), _numbers(other)
    for name in sorted(set(theirs) - {"sample", "timestep"}):
        if (wrong := _different_array(report, name, number, ours[name], theirs[name], TOLERANCE)) is not None:
            return wrong
    for name, part in (("mask", slice(channels, channels + 1)), ("masked image", slice(channels + 1, None)),
                       ("initial sample" if number == 1 else "sample", slice(0, channels))):
        mine, other = ours["sample"][:, part], theirs["sample"][:, part]
        if mine.size or other.size:
            if (wrong := _different_array(report, name, number, mine, other, within)) is not None:
                return wrong
    return None


def _different_array(report: FeedsReport, name: str, number: int, ours: Array, theirs: Array, within: float,
                     ) -> _Found | None:
    if ours.shape != theirs.shape:
        return name, number, f"shape {ours.shape}", f"shape {theirs.shape}"
    error = relative_l2(theirs, ours)
    report.relative_l2[name] = max(report.relative_l2.get(name, 0.0), error)
    if error <= within:
        return None
    worst = np.unravel_index(np.argmax(np.abs(ours.astype(np.float64) - theirs)), ours.shape)
    place = "".join(f"[{i}]" for i in worst)
    return name, number, f"{place} {ours[worst]:.5g}", f"{theirs[worst]:.5g}, relative L2 {error:.2g}"


def _unknown_prompt(theirs: Sequence[Array], ours: Sequence[Array]) -> tuple[str, str] | None:
    """The first row of ids that only they read, beside ours that is nearest to it."""
    for row in theirs:
        if any(np.array_equal(row, other) for other in ours):
            continue
        near = min((o for o in ours if o.shape == row.shape), key=lambda o: int((o != row).sum()), default=None)
        if near is None:
            return f"{len(ours[0]) if len(ours) else 0} tokens", f"{len(row)} tokens"
        first = int(np.argmax(near != row))
        return f"{near[first]} at {first}", f"{row[first]}"
    return None


def _close(one: Array, other: Array) -> bool:
    return one.shape == other.shape and relative_l2(other, one) <= TOLERANCE


def _shown(image: Array | None = None) -> str:
    return "none" if image is None else f"{image.shape[2]}x{image.shape[1]}, mean {image.mean():.4g}"


def _numbers(values: Array) -> str:
    return ", ".join(f"{v:.6g}" for v in values)


_Found = tuple[str, int, str, str]
