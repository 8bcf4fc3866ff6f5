"""Classifier-free guidance: Ho & Salimans, arXiv 2207.12598. Both predictions of the U-Net in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner, row_range, slices
from runtimes.backends.session import Session
from runtimes.errors import InputError
from runtimes.pipeline.conditioner import Conditions

Float32 = NDArray[np.float32]
# The second entry of a U-Net built with --step-cache, and the output of the first that it takes as an input.
SHALLOW, DEEP = "unet_shallow", "deep_feature"


@dataclass(frozen=True)
class Guidance:
    """How strongly and when the prompt is followed.

    Attributes:
        scale: guidance scale; at 1 and below guidance is off.
        rescale: share in which the guided prediction takes the deviation of the prompt's own, 0 to 1: section 3.4 of
            Lin et al., arXiv 2305.08891, against overexposure.
        interval: first and last share of the steps under guidance; outside of it a step costs half. Kynkäänniemi et
            al., Applying Guidance in a Limited Interval, arXiv 2404.07724: at high noise guidance costs variety, at low
            noise it does nothing. Counted in steps as diffusers' guiders do.
        below_one: whether every scale but 1 guides; see `PipelineFacts.guides_below_one`.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    below_one: bool = False

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 <= self.rescale <= 1:
            raise InputError(f"{self.rescale} is not between 0 and 1", where="guidance_rescale", fix="0.7 is usual")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise InputError(f"{self.interval} is not an interval within 0 to 1", where="guidance_interval",
                             fix="(0, 1) is every step, (0.1, 0.7) leaves out the first tenth and the end")

    @property
    def on(self) -> bool:
        """Whether any step can be guided."""
        return self.scale > 1 or (self.below_one and self.scale != 1)

    def active(self, i: int, total: int) -> bool:
        """Whether step i of `total` is guided."""
        first, last = self.interval
        return self.on and int(first * total) <= i < int(last * total)

    def combine(self, uncond: Float32, cond: Float32) -> Float32:
        """The guided prediction, eq. 6 with w = scale - 1 as diffusers counts it: (B, C, H/f, W/f) float32 each.

        `cond` is overwritten with the result: it is the network's output, which nobody else holds.
        """
        wanted = _deviation(cond) if self.rescale else None
        cond -= uncond
        cond *= np.float32(self.scale)
        cond += uncond
        if wanted is None:
            return cond
        rescaled = cond * (wanted / _deviation(cond))
        return np.float32(self.rescale) * rescaled + np.float32(1 - self.rescale) * cond


def _deviation(prediction: Float32) -> Float32:
    """Standard deviation of each image: (B, 1, 1, 1) float32."""
    deviation: Float32 = prediction.std(axis=(1, 2, 3), ddof=1, keepdims=True)
    return deviation


class GuidedUnet:
    """The U-Net under one set of prompts, for as many images as a call has.

    More images than the U-Net's batch axis allows are cut into several calls, each holding both halves of its images.
    So are images whose prompts are of different lengths: each is computed as it would be alone.

    With a shallow U-Net, most steps reuse the deep feature of an earlier one: Ma et al., DeepCache, arXiv 2312.00858,
    section 3.3 with the uniform 1:N strategy. The first step of a run and of a change of guidance are whole.
    """

    def __init__(
        self, unet: Session, conditions: Conditions, guidance: Guidance, steps: int, *, extra: Float32 | None = None,
        shallow: Session | None = None, cache_interval: int = 1, images_at_once: int | None = None,
    ) -> None:
        """Lay out the batches.

        Args:
            unet: sample, timestep, and what of the conditions it takes -> out_sample, and deep_feature if there is a
                shallow one.
            conditions: of each of the B images, each negative prompt as long as its prompt; without any, guidance is
                off.
            guidance: scale, rescaling and interval.
            steps: U-Net calls of the whole run.
            extra: (B, C', H/f, W/f) channels that the U-Net takes after the sample's own: those of inpainting.
            shallow: the U-Net's second entry, which takes deep_feature too; None where every step is whole.
            cache_interval: every so many steps the deep feature is computed anew.
            images_at_once: at most so many share a call; as many as the U-Net takes if None.
        """
        self._unet, self._shallow, self._guidance, self._steps = unet, shallow, guidance, steps
        self._conditions, self._extra = conditions, extra
        self._interval, self._at_once = 1 if shallow is None else cache_interval, images_at_once
        self._layouts: dict[bool, list[_Part]] = {}
        self._whole = self._plan_whole_steps()

    def __call__(self, sample: Float32, timestep: float, i: int) -> Float32:
        """Predict: (B, C, H/f, W/f) float32 at step i in, the same out."""
        guided, whole = self._guided(i), self._whole[i]
        if guided not in self._layouts:
            self._layouts[guided] = self._lay_out(guided)
        parts = self._layouts[guided]
        if len(parts) == 1:
            return self._predict(sample, timestep, parts[0], guided, whole)
        predictions = [self._predict(sample[part.rows], timestep, part, guided, whole) for part in parts]
        result = np.empty((len(sample), *predictions[0].shape[1:]), np.float32)
        for part, prediction in zip(parts, predictions, strict=True):
            result[part.rows] = prediction
        return result

    def whole_steps(self, i: int) -> int:
        """How many of the steps before i and of i itself compute everything."""
        return sum(self._whole[: i + 1])

    def _guided(self, i: int) -> bool:
        return self._conditions.uncond is not None and self._guidance.active(i, self._steps)

    def _plan_whole_steps(self) -> list[bool]:
        """For each step, whether it computes the deep feature."""
        ages: list[int] = []
        for i in range(self._steps):
            goes_on = i > 0 and self._guided(i) == self._guided(i - 1)
            ages.append((ages[-1] + 1) % self._interval if goes_on else 0)
        return [age == 0 for age in ages]

    def _predict(self, sample: Float32, timestep: float, part: _Part, guided: bool, whole: bool) -> Float32:
        if part.extra is not None:
            sample = np.concatenate([sample, part.extra], axis=1)
        if guided:
            sample = np.concatenate([sample, sample])
        feeds = {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32),
                 "encoder_hidden_states": part.hidden, **part.added}
        output: Float32 = part.run(feeds, whole=whole)
        if output.dtype != np.float32:
            output = output.astype(np.float32)
        if not guided:
            return output
        half = len(output) // 2
        return self._guidance.combine(output[:half], output[half:])

    def _lay_out(self, guided: bool) -> list[_Part]:
        most = row_range(self._unet).max
        most = max(most // 2, 1) if guided else most
        most = min(most, self._at_once or most)
        by_length: dict[int, list[int]] = {}
        for row, hidden in enumerate(self._conditions.cond):
            by_length.setdefault(len(hidden), []).append(row)
        parts = []
        for rows in by_length.values():
            parts += [self._part(rows[piece], guided) for piece in slices(len(rows), most)]
        return parts

    def _part(self, rows: list[int], guided: bool) -> _Part:
        conditions = self._conditions
        hidden = [conditions.cond[row] for row in rows]
        added = {name: values[rows] for name, values in conditions.added.items()}
        if guided and conditions.uncond is not None:
            hidden = [*(conditions.uncond[row] for row in rows), *hidden]
            added = {name: np.concatenate([conditions.added_uncond[name][rows], values])
                     for name, values in added.items()}
        unet = RowRunner(self._unet, len(hidden))
        shallow = None if self._shallow is None else RowRunner(self._shallow, len(hidden))
        extra = None if self._extra is None else self._extra[rows]
        return _Part(rows, unet, shallow, unet.cast("encoder_hidden_states", np.stack(hidden)), extra,
                     {name: unet.cast(name, values) for name, values in added.items()})


@dataclass
class _Part:
    """Images that share a call of the U-Net.

    Attributes:
        rows: which of the call's images.
        unet, shallow: the networks under their number, doubled under guidance.
        hidden: (rows, tokens, width) embedded prompts, the negative ones first; in the U-Net's dtype.
        extra: (images, C', H/f, W/f) float32 or None.
        added: further inputs by name, (rows, n) each.
        deep: the deep feature of the last whole step, or None before it.
    """

    rows: list[int]
    unet: RowRunner
    shallow: RowRunner | None
    hidden: NDArray[Any]
    extra: Float32 | None
    added: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    deep: NDArray[Any] | None = None

    def run(self, feeds: dict[str, NDArray[Any]], *, whole: bool) -> NDArray[Any]:
        """The prediction of the whole U-Net, or of the shallow one under the deep feature kept from it."""
        if whole or self.shallow is None or self.deep is None:
            outputs = self.unet.run(feeds)
            self.deep = outputs.get(DEEP)
            return outputs["out_sample"]
        return self.shallow.run({**feeds, DEEP: self.deep})["out_sample"]
