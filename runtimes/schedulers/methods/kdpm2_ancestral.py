"""DPM-Solver-2 with ancestral noise: k-diffusion's `sample_dpm_2_ancestral`. Two model calls a step but the last."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runtimes.schedulers.methods.kdpm2 import Kdpm2, Kdpm2Run, between
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.sampler_run import required
from runtimes.schedulers.variance_exploding import ancestral_levels


@dataclass(frozen=True, kw_only=True)
class Kdpm2Ancestral(Kdpm2):
    """The method with the keys and defaults of diffusers' KDPM2AncestralDiscreteScheduler."""

    def _run(self, steps: int, first: int, eta: float) -> Kdpm2AncestralRun:
        timesteps, levels = self.schedule(steps)
        float32 = levels.astype(np.float32)
        pairs = [ancestral_levels(*pair) for pair in pairwise(float32)]
        ups, downs = (np.array(numbers, dtype=np.float32) for numbers in zip(*pairs, strict=True))
        middles = np.array([between(*pair) for pair in zip(float32[:-1], downs, strict=True)], dtype=np.float32)
        middles[-1] = 0
        run = Kdpm2AncestralRun(self, self._calls(timesteps, middles[:-1]), float32, middles, first)
        run.ups, run.downs = np.repeat(ups, 2)[first:], np.repeat(downs, 2)[first:]
        return run


class Kdpm2AncestralRun(Kdpm2Run):
    """One run: as `Kdpm2Run` to below the next noise level, then fresh noise up to it.

    Attributes:
        ups: (calls + 1,) float32, noise level that is added at the end of each step, once for each of its model calls.
        downs: (calls + 1,) float32, noise level below the next one that each step goes down to.
    """

    ups: Float32
    downs: Float32

    def needs_noise(self, i: int) -> bool:
        """The second call of every step."""
        return self._halfway(i)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Half a step, then the whole one, with noise."""
        start = self._before
        if start is None:
            return super().step(model_output, i, sample)
        self._in_order(i)
        self._before = None
        slope = self._slope(model_output, i, sample)
        below: Float32 = start + slope * np.float32(self.downs[i] - self._sigmas[i - 1])
        return below + required(noise) * np.float32(self.ups[i])
