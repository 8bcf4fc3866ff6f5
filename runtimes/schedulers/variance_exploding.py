"""What k-diffusion's methods of order 1 and 2 share, in variance-exploding form, x = x_0 + sigma noise.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.

The arithmetic is float32 in diffusers' order: at high noise x and x_0 + sigma noise cancel, and what is left depends on
how they were rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.rounding import root
from runtimes.schedulers.sampler_run import RunBase
from runtimes.schedulers.settings import Settings, SpreadSettings


def linear_schedule(settings: Settings, steps: int) -> tuple[Float32, Float64]:
    """Timesteps, not rounded, (steps,) float32, and their noise levels, (steps,) float64; both descend."""
    timesteps = noise_levels.spaced_timesteps(
        settings.timestep_spacing, steps, settings.num_train_timesteps, settings.steps_offset
    ).astype(np.float32)
    return timesteps, noise_levels.interpolated_sigmas(timesteps, settings.training_sigmas)


@dataclass(frozen=True, kw_only=True)
class SecondOrderSettings(SpreadSettings):
    """The keys of the methods that ask the model twice a step, with the defaults of their diffusers classes."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def schedule(self, steps: int) -> tuple[Float32 | Float64, Float64]:
        """Timesteps of the steps, (steps,) float, and noise levels, (steps + 1,) float64, the last of them 0.

        Timesteps are float64 where levels are chosen by formula, else float32.
        """
        timesteps: Float32 | Float64
        timesteps, levels = linear_schedule(self, steps)
        if self.spreads:
            levels = self.spread(levels, steps)
            timesteps = noise_levels.timesteps_of(levels, self.training_sigmas)
        return timesteps, np.append(levels, 0.0)


def doubled(values: Float32) -> Float32:
    """a, b, c, ... as a, b, b, c, c, ...: a timestep or noise level of each step for each of its model calls.

    (n,) float32 -> (2n - 1,) float32.
    """
    return np.repeat(values, 2)[1:]


class ExplodingRun(RunBase):
    """One run in variance-exploding form."""

    def __init__(self, settings: Settings, timesteps: Timesteps, levels: Float32, first: int) -> None:
        """Leave out the `first` of `timesteps`, (n,); `levels`, (n + 1,), are theirs and the one where the run ends."""
        largest = float(levels.max())
        if settings.timestep_spacing == "leading":  # which starts below the noise level of the last training step
            largest = (largest**2 + 1) ** 0.5
        noise = [(1.0, level) for level in levels[: len(timesteps)]]
        super().__init__(timesteps.astype(np.float32), noise, first, largest)
        self._kind = settings.prediction_type
        self._sigmas = levels[first:]

    def input_sigma(self, i: int) -> np.float32:
        """Noise level of the sample that the model is asked about at step i."""
        return np.float32(self._sigmas[i])

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """`sample` in variance-preserving form."""
        return np.asarray(sample / root(self.input_sigma(i) ** 2 + 1), dtype=np.float32)

    def _original(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """x_0, by the formulas of `prediction.to_original` in variance-exploding form."""
        sigma = self.input_sigma(i)
        if self._kind == EPSILON:
            return np.asarray(sample - sigma * model_output)
        if self._kind == V_PREDICTION:
            skip = np.asarray(sample / (sigma**2 + 1), dtype=np.float32)
            return model_output * (-sigma / root(sigma**2 + 1)) + skip
        return model_output

    def _slope(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """dx/dsigma = (x - x_0) / sigma, eqs. 1 and 3 with sigma(t) = t."""
        return np.asarray((sample - self._original(model_output, i, sample)) / self.input_sigma(i), dtype=np.float32)


class EulerRun(ExplodingRun):
    """One run of Euler's method."""

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """x + (sigma' - sigma) dx/dsigma: arXiv 2206.00364, Algorithm 1, lines 4 and 5."""
        return sample + self._slope(model_output, i, sample) * np.float32(self._sigmas[i + 1] - self._sigmas[i])


def ancestral_levels(now: np.float32, after: np.float32) -> tuple[np.float32, np.float32]:
    """(up, down) with up^2 + down^2 = after^2, up being the posterior deviation: arXiv 2006.11239, eq. 7.

    A difference that rounding makes negative is 0; diffusers' root of it is NaN.
    """
    up = root(max(after**2 * (now**2 - after**2) / now**2, np.float32(0)))
    return up, root(max(after**2 - up**2, np.float32(0)))


