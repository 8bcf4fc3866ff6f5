"""Heun's method: Karras et al., arXiv 2206.00364, Algorithm 1. Two model calls a step, one for the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.settings import CHOICES
from runtimes.schedulers.variance_exploding import ExplodingRun, SecondOrderSettings, doubled


@dataclass(frozen=True, kw_only=True)
class Heun(SecondOrderSettings):
    """Heun's method with the keys and defaults of diffusers' HeunDiscreteScheduler."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"beta_schedule": (*CHOICES["beta_schedule"], "exp")}
    )
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    order: ClassVar[int] = 2

    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def _run(self, steps: int, first: int, eta: float) -> HeunRun:
        timesteps, levels = self.schedule(steps)
        calls = doubled(levels[:-1].astype(np.float32))
        clip = self.clip_sample_range if self.clip_sample else None
        return HeunRun(self, doubled(timesteps.astype(np.float32)), np.append(calls, np.float32(0)), first, clip)


class HeunRun(ExplodingRun):
    """One run of Heun's method."""

    def __init__(
        self, settings: Heun, timesteps: Float32, levels: Float32, first: int, clip: float | None
    ) -> None:
        """Call the model at `timesteps`; clip x_0 to -clip..clip unless None."""
        super().__init__(settings, timesteps, levels, first)
        self._clip = clip
        self._before: tuple[Float32, Float32, np.float32] | None = None  # sample, slope, length of the step under way

    def _original(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        original = super()._original(model_output, i, sample)
        return original if self._clip is None else np.clip(original, np.float32(-self._clip), np.float32(self._clip))

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Lines 4 and 5 of the algorithm, then lines 7 and 8: the mean of the slopes at both ends of the step."""
        self._in_order(i)
        slope = self._slope(model_output, i, sample)
        if self._before is not None:
            start, first_slope, length = self._before
            self._before = None
            return start + (first_slope + slope) / np.float32(2) * length
        length = np.float32(self._sigmas[i + 1] - self._sigmas[i])
        self._before = sample, slope, length
        return sample + slope * length
