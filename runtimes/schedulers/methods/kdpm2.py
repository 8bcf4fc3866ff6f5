"""DPM-Solver-2 in sigma: Karras et al., arXiv 2206.00364, Algorithm 2 without its churn; k-diffusion's `sample_dpm_2`.

Two model calls a step, the second at the geometric mean of its noise levels; one for the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.rounding import exp, log
from runtimes.schedulers.variance_exploding import ExplodingRun, SecondOrderSettings, doubled


@dataclass(frozen=True, kw_only=True)
class Kdpm2(SecondOrderSettings):
    """DPM-Solver-2 with the keys and defaults of diffusers' KDPM2DiscreteScheduler."""

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION)
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    order: ClassVar[int] = 2

    def _run(self, steps: int, first: int, eta: float) -> Kdpm2Run:
        timesteps, levels = self.schedule(steps)
        middles = np.array([between(*pair) for pair in pairwise(levels)], dtype=np.float32)
        return Kdpm2Run(self, self._calls(timesteps, middles[:-1]), levels.astype(np.float32), middles, first)

    def _calls(self, timesteps: Float32 | Float64, middles: Float32) -> Float32:
        """The timestep of each model call: of a step, of its middle, of the next step, ...: (2n - 1,)."""
        if self.use_karras_sigmas:
            timesteps = timesteps.round()
        calls = np.empty(2 * len(timesteps) - 1, dtype=np.float32)
        calls[::2] = timesteps
        calls[1::2] = noise_levels.timesteps_of(middles.astype(np.float64), self.training_sigmas)
        return calls


def between(now: float, after: float) -> np.float32:
    """The geometric mean of two levels, 0 at 0; torch.lerp counts from its second argument."""
    low, high = log(after), log(now)
    return np.float32(0) if np.isinf(low) else exp(high - (high - low) * np.float32(0.5))


class Kdpm2Run(ExplodingRun):
    """One run of DPM-Solver-2."""

    def __init__(self, settings: Kdpm2, calls: Float32, levels: Float32, middles: Float32, first: int) -> None:
        """Call the model at `calls`, (2n - 1,) but the `first` of them.

        `levels`, (n + 1,) float32, are those of the steps, `middles`, (n,) float32, lie between each two.
        """
        super().__init__(settings, calls, np.append(doubled(levels[:-1]), np.float32(0)), first)
        self._middles = np.repeat(middles, 2)[first:]
        self._before: Float32 | None = None  # the sample that the step under way started from

    def input_sigma(self, i: int) -> np.float32:
        """Of a step's own level, then of its middle."""
        return np.float32(self._middles[i] if self._halfway(i) else self._sigmas[i])

    def _halfway(self, i: int) -> bool:
        """Whether call i is a step's second; a run begins with a step's first."""
        return i % 2 == 1

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Half a step, then the whole one with the slope found in its middle."""
        self._in_order(i)
        slope = self._slope(model_output, i, sample)
        if self._before is not None:
            start, self._before = self._before, None
            return start + slope * np.float32(self._sigmas[i] - self._sigmas[i - 1])
        self._before = sample
        return sample + slope * np.float32(self._middles[i] - self._sigmas[i])
