"""DDIM: Song, Meng & Ermon, Denoising Diffusion Implicit Models, arXiv 2010.02502."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.prediction import to_epsilon, to_original
from runtimes.schedulers.settings import RunBase, Settings, required
from runtimes.schedulers.sigmas import Float32


@dataclass(frozen=True, kw_only=True)
class Ddim(Settings):
    """DDIM with the keys and defaults of diffusers' DDIMScheduler."""

    unsupported: ClassVar[Mapping[str, object]] = MappingProxyType({"thresholding": False})

    timestep_spacing: str = "leading"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0) -> DdimRun:
        """Begin a run; see `protocol.Scheduler.start`."""
        if not 0 <= eta <= 1:
            raise InputError(f"eta {eta!r} is not between 0 and 1", where="eta", fix="0 is deterministic, 1 is DDPM")
        return DdimRun(self, steps, self.check_start(steps, strength), eta)


class DdimRun(RunBase):
    """One run of DDIM. The numbers of every step are computed once, ahead of the loop."""

    def __init__(self, scheduler: Ddim, steps: int, first: int, eta: float) -> None:
        """Leave out the `first` of `steps` steps."""
        timesteps = scheduler.whole_timesteps(steps)[first:]
        super().__init__(timesteps, [scheduler.levels(int(t)) for t in timesteps])
        self._scheduler = scheduler
        stride = scheduler.num_train_timesteps // steps
        now = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
        self._after = [self._signal(int(t) - stride) for t in timesteps]
        # sigma_t(eta)^2, eq. 16
        self._variances = [eta**2 * (1 - b) / (1 - a) * (1 - a / b) for a, b in zip(now, self._after, strict=True)]

    def needs_noise(self, i: int) -> bool:
        """Whether eta adds noise at step i, which it does except where no noise is left to the sample."""
        return self._variances[i] > 0

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Eq. 12: predicted x_0, plus the direction pointing to x_t, plus sigma_t(eta) times fresh noise."""
        config = self._scheduler
        alpha, sigma = self._levels[i]
        original = to_original(config.prediction_type, model_output, sample, alpha, sigma)
        epsilon = to_epsilon(config.prediction_type, model_output, sample, alpha, sigma)
        if config.clip_sample:
            original = np.clip(original, -config.clip_sample_range, config.clip_sample_range)
        variance, signal = self._variances[i], self._after[i]
        previous = math.sqrt(signal) * original + math.sqrt(max(1 - signal - variance, 0.0)) * epsilon
        return previous + math.sqrt(variance) * required(noise) if variance > 0 else previous

    def _signal(self, timestep: int) -> float:
        """Share of signal variance that a step to `timestep` leads to."""
        if timestep < 0 and self._scheduler.set_alpha_to_one:
            return 1.0
        return float(self._scheduler.alphas_cumprod[max(timestep, 0)])
