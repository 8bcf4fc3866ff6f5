"""LCM: Luo et al., Latent Consistency Models, arXiv 2310.04378. For models distilled to take 1 to 8 steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import limited, to_original
from runtimes.schedulers.sampler_run import RunBase, required
from runtimes.schedulers.settings import WHERE, ThresholdSettings

# Standard deviation of the data that the boundary condition f(x, 0) = x is scaled by.
SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class DistilledSettings(ThresholdSettings):
    """The keys and defaults of diffusers' LCMScheduler and TCDScheduler, which have a spacing of their own."""

    # Never looked at: the spacing is the distillation's, and its last timestep is not below 0.
    inert: ClassVar[frozenset[str]] = frozenset({"timestep_spacing", "steps_offset", "set_alpha_to_one"})
    foreign: ClassVar[frozenset[str]] = frozenset({"timestep_spacing", "steps_offset"})

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50

    def distilled_timesteps(self, steps: int) -> npt.NDArray[np.int64]:
        """Evenly chosen from the timesteps of the distillation, highest first: (steps,) int64."""
        original = self.original_inference_steps
        if not 1 <= original <= self.num_train_timesteps:
            raise InputError(
                f"original_inference_steps must be 1 to {self.num_train_timesteps}", where=WHERE, fix="50 is usual"
            )
        if steps > original:
            raise InputError(
                f"{steps} steps of a model distilled over {original}", where="steps", fix=f"take at most {original}"
            )
        distilled = (np.arange(original, 0, -1) * (self.num_train_timesteps // original) - 1).astype(np.int64)
        return distilled[np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)]


@dataclass(frozen=True, kw_only=True)
class Lcm(DistilledSettings):
    """Consistency sampling."""

    clip_sample: bool = False
    clip_sample_range: float = 1.0
    timestep_scaling: float = 10.0

    def _run(self, steps: int, first: int, eta: float) -> LcmRun:
        return LcmRun(self, self.distilled_timesteps(steps), first)


class LcmRun(RunBase):
    """One run of consistency sampling."""

    def __init__(self, scheduler: Lcm, timesteps: npt.NDArray[np.int64], first: int) -> None:
        """Take the steps at `timesteps`, (n,) int64 descending, but the `first` of them."""
        clips = scheduler.clip_sample and not scheduler.thresholding
        super().__init__(*scheduler.visited(timesteps, first, clips=clips))
        self._scheduler = scheduler
        self._clip = scheduler.clip_sample_range if scheduler.clip_sample else None

    def needs_noise(self, i: int) -> bool:
        """Every step but the last."""
        return i < len(self.timesteps) - 1

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """The consistency function c_skip x + c_out x_0, diffused again to the next timestep.

        Song et al., Consistency Models, arXiv 2303.01469, eq. 5 and Algorithm 1.
        """
        config, timestep = self._scheduler, int(self.timesteps[i])
        original = to_original(config.prediction_type, model_output, sample, *self._levels[i])
        original = limited(config, original, self._clip)
        scaled = timestep * config.timestep_scaling
        denoised = scaled / math.hypot(scaled, SIGMA_DATA) * original
        denoised = denoised + SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2) * sample
        if not self.needs_noise(i):
            return denoised
        alpha, sigma = self._levels[i + 1]
        return alpha * denoised + sigma * required(noise)
