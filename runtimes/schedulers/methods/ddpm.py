"""DDPM: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import limited, to_original
from runtimes.schedulers.rounding import exp, log, root
from runtimes.schedulers.sampler_run import RunBase, required
from runtimes.schedulers.settings import CHOICES, ThresholdSettings

ONE = np.float32(1)


@dataclass(frozen=True, kw_only=True)
class Ddpm(ThresholdSettings):
    """Ancestral sampling with the keys and defaults of diffusers' DDPMScheduler."""

    # Learned variances mean a model with outputs of their own; fixed_large_log is not finite in diffusers.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "beta_schedule": (*CHOICES["beta_schedule"], "laplace", "sigmoid"),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
        }
    )

    timestep_spacing: str = "leading"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Ddpm:
        """See `Settings.from_config`.

        A variance_type of null, which configs of DPM-Solver and SA-Solver hold, means fixed_small to
        DDPMScheduler._get_variance."""
        return super().from_config({k: v for k, v in config.items() if v is not None or k != "variance_type"})

    def _run(self, steps: int, first: int, eta: float) -> DdpmRun:
        return DdpmRun(self, steps, first)


class DdpmRun(RunBase):
    """One run of ancestral sampling."""

    def __init__(self, scheduler: Ddpm, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        self._clip = scheduler.clip_sample_range if scheduler.clip_sample else None
        clips = scheduler.clip_sample and not scheduler.thresholding
        super().__init__(*scheduler.visited(scheduler.whole_timesteps(steps), first, clips=clips))
        self._scheduler = scheduler
        signals = scheduler.alphas_cumprod[self.timesteps]
        self._pairs = list(zip(signals, [*signals[1:], ONE], strict=True))

    def needs_noise(self, i: int) -> bool:
        """Every step but one from timestep 0."""
        return int(self.timesteps[i]) > 0

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Eq. 7: the mean of the posterior given x_0 and x_t, plus noise of its variance."""
        kind, (alpha, sigma) = self._scheduler.prediction_type, self._levels[i]
        original = limited(self._scheduler, to_original(kind, model_output, sample, alpha, sigma), self._clip)
        now, after = self._pairs[i]
        beta = ONE - now / after
        mean: Float32 = root(after) * beta / (ONE - now) * original
        mean = mean + root(now / after) * (ONE - after) / (ONE - now) * sample
        return mean + self._deviation(now, after, beta) * required(noise) if self.needs_noise(i) else mean

    def _deviation(self, now: np.float32, after: np.float32, beta: np.float32) -> np.float32:
        """The posterior's, section 3.2: its lower or its upper bound."""
        kind = self._scheduler.variance_type
        small = max((ONE - after) / (ONE - now) * beta, np.float32(1e-20))
        if kind == "fixed_small_log":
            return exp(np.float32(0.5) * log(small))
        return root(beta if kind == "fixed_large" else small)
