"""Linear multistep: Adams-Bashforth in sigma with uneven steps, order 4; k-diffusion's `sample_lms`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtimes.schedulers import sigmas
from runtimes.schedulers.exploding import ExplodingRun, linear_schedule
from runtimes.schedulers.settings import SpreadSettings
from runtimes.schedulers.sigmas import Float32

ORDER = 4


@dataclass(frozen=True, kw_only=True)
class Lms(SpreadSettings):
    """The method with the keys and defaults of diffusers' LMSDiscreteScheduler."""

    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    karras_limits: ClassVar[bool] = False

    def _run(self, steps: int, first: int, eta: float) -> LmsRun:
        timesteps, levels = linear_schedule(self, steps)
        if self.spreads:
            levels = self.spread(levels, steps)
            timesteps = sigmas.timesteps_of(levels, self.training_sigmas).astype(np.float32)
        return LmsRun(self, timesteps, np.append(levels, 0.0).astype(np.float32), first)


class LmsRun(ExplodingRun):
    """One run of the linear multistep method."""

    def __init__(self, settings: Lms, timesteps: Float32, levels: Float32, first: int) -> None:
        """Leave out the `first` of `timesteps`."""
        super().__init__(settings, timesteps, levels, first)
        self._weights = [_weights(levels.astype(np.float64), first + i) for i in range(len(self.timesteps))]
        self._slopes: list[Float32] = []  # newest first, four at most

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """x plus the integral of the polynomial through the last slopes."""
        self._in_order(i)
        self._slopes = [self._slope(model_output, i, sample), *self._slopes[: ORDER - 1]]
        # Image to image has fewer slopes at first than weights: diffusers then leaves out the oldest ones' share.
        weighted = [weight * slope for weight, slope in zip(self._weights[i], self._slopes, strict=False)]
        return sample + np.sum(weighted, axis=0, dtype=np.float32)


def _weights(levels: sigmas.Float64, i: int) -> list[float]:
    """Integrals from level i to level i + 1 of the Lagrange polynomials over the levels i, i - 1, ..., four at most."""
    known = levels[max(i - ORDER + 1, 0) : i + 1][::-1]
    weights = []
    for k, level in enumerate(known):
        others = np.delete(known, k)
        # shifted to levels[i], so that no two large numbers are subtracted
        integral = np.polyint(np.atleast_1d(np.poly(others - levels[i])))
        weights.append(float(np.polyval(integral, levels[i + 1] - levels[i]) / np.prod(level - others)))
    return weights
