"""Ancestral sampling with Euler steps: k-diffusion's `sample_euler_ancestral`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.sampler_run import required
from runtimes.schedulers.settings import Settings
from runtimes.schedulers.variance_exploding import EulerRun, ancestral_levels, linear_schedule


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Settings):
    """Ancestral sampling with the keys and defaults of diffusers' EulerAncestralDiscreteScheduler."""

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION)

    def _run(self, steps: int, first: int, eta: float) -> EulerAncestralRun:
        timesteps, levels = linear_schedule(self, steps)
        return EulerAncestralRun(self, timesteps, np.append(levels, 0.0).astype(np.float32), first)


class EulerAncestralRun(EulerRun):
    """One run of ancestral sampling: a step to below the next noise level, then fresh noise up to it."""

    def needs_noise(self, i: int) -> bool:
        """Every step but the one to the clean sample."""
        return bool(self._sigmas[i + 1] > 0)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Euler's step to `ancestral_levels`' down, then noise of its up."""
        up, down = ancestral_levels(self._sigmas[i], self._sigmas[i + 1])
        previous: Float32 = sample + self._slope(model_output, i, sample) * (down - self._sigmas[i])
        return previous + required(noise) * up if self.needs_noise(i) else previous
