"""TCD: Zheng et al., Trajectory Consistency Distillation, arXiv 2402.19159. For models distilled to few steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from runtimes.schedulers.methods.lcm import DistilledSettings
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import to_epsilon, to_original
from runtimes.schedulers.rounding import root
from runtimes.schedulers.sampler_run import RunBase, required


@dataclass(frozen=True, kw_only=True)
class Tcd(DistilledSettings):
    """Strategic stochastic sampling with the keys and defaults of diffusers' TCDScheduler, which never clips."""

    inert: ClassVar[frozenset[str]] = DistilledSettings.inert | {"clip_sample", "clip_sample_range", "timestep_scaling"}
    reads_eta: ClassVar[bool] = True

    def _run(self, steps: int, first: int, eta: float) -> TcdRun:
        return TcdRun(self, self.distilled_timesteps(steps), first, eta)


class TcdRun(RunBase):
    """One run. `eta` is the paper's gamma; at 0, which pipelines pass by default, it is deterministic."""

    def __init__(self, scheduler: Tcd, timesteps: npt.NDArray[np.int64], first: int, eta: float) -> None:
        """Take the steps at `timesteps`, (n,) int64 descending, but the `first` of them."""
        super().__init__(*scheduler.visited(timesteps, first))
        self._scheduler, self._eta = scheduler, eta

    def needs_noise(self, i: int) -> bool:
        """Every step but the last, unless eta is 0."""
        return self._eta > 0 and i < len(self.timesteps) - 1

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Algorithm 4 of the paper: denoise to below the next timestep, then diffuse up to it."""
        config, (alpha, sigma) = self._scheduler, self._levels[i]
        original = to_original(config.prediction_type, model_output, sample, alpha, sigma)
        epsilon = to_epsilon(config.prediction_type, model_output, sample, alpha, sigma)
        after = int(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else 0
        below = int(np.floor(np.float32(1 - self._eta) * np.float32(after)))
        alpha_below, sigma_below = config.levels(below)
        denoised = alpha_below * original + sigma_below * epsilon
        if not self.needs_noise(i):
            return denoised
        signal = np.float32(config.alphas_cumprod[after] / config.alphas_cumprod[below])
        return root(signal) * denoised + root(np.float32(1) - signal) * required(noise)
