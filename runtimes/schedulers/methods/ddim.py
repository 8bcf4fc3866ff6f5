"""DDIM: Song, Meng & Ermon, Denoising Diffusion Implicit Models, arXiv 2010.02502."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import limited, to_epsilon, to_original
from runtimes.schedulers.rounding import root
from runtimes.schedulers.sampler_run import RunBase, required
from runtimes.schedulers.settings import ThresholdSettings


@dataclass(frozen=True, kw_only=True)
class Ddim(ThresholdSettings):
    """DDIM with the keys and defaults of diffusers' DDIMScheduler."""

    reads_eta: ClassVar[bool] = True

    timestep_spacing: str = "leading"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    def _run(self, steps: int, first: int, eta: float) -> DdimRun:
        return DdimRun(self, steps, first, eta)


class DdimRun(RunBase):
    """One run of DDIM. The numbers of every step are computed once, ahead of the loop."""

    def __init__(self, scheduler: Ddim, steps: int, first: int, eta: float) -> None:
        """Leave out the `first` of `steps` steps."""
        self._clip = scheduler.clip_sample_range if scheduler.clip_sample else None
        clips = scheduler.clip_sample and not scheduler.thresholding
        super().__init__(*scheduler.visited(scheduler.whole_timesteps(steps), first, clips=clips))
        self._scheduler, self._eta = scheduler, eta
        stride = scheduler.num_train_timesteps // steps
        self._after = [self._signal(int(t) - stride) for t in self.timesteps]
        # sigma_t(eta), eq. 16
        variances = [max(self._variance(i), np.float32(0)) for i in range(len(self._after))]
        self._deviations = [np.float32(eta) * root(variance) for variance in variances]

    def needs_noise(self, i: int) -> bool:
        """Whether eta adds noise."""
        return self._eta > 0

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Eq. 12: predicted x_0, plus the direction pointing to x_t, plus sigma_t(eta) times fresh noise."""
        kind, (alpha, sigma) = self._scheduler.prediction_type, self._levels[i]
        original = limited(self._scheduler, to_original(kind, model_output, sample, alpha, sigma), self._clip)
        epsilon = to_epsilon(kind, model_output, sample, alpha, sigma)
        deviation, signal = self._deviations[i], self._after[i]
        direction = root(max(np.float32(1) - signal - deviation**2, np.float32(0))) * epsilon
        previous = root(signal) * original + direction
        return previous + deviation * required(noise) if self.needs_noise(i) else previous

    def _signal(self, timestep: int) -> np.float32:
        """Share of signal variance that a step to `timestep` leads to."""
        if timestep < 0 and self._scheduler.set_alpha_to_one:
            return np.float32(1)
        return np.float32(self._scheduler.alphas_cumprod[max(timestep, 0)])

    def _variance(self, i: int) -> np.float32:
        now, after, one = self._scheduler.alphas_cumprod[int(self.timesteps[i])], self._after[i], np.float32(1)
        return np.float32((one - after) / (one - now) * (one - now / after))
