"""Euler's method and its ancestral variant, in variance-exploding form: x = x_0 + sigma noise.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, Algorithm 1 with
the first-order step alone; the ancestral step is k-diffusion's `sample_euler_ancestral`.

The arithmetic is float32 in diffusers' order: at high noise x and x_0 + sigma noise cancel, and what is left depends on
how they were rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers import sigmas
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.settings import RunBase, Settings, required
from runtimes.schedulers.sigmas import Float32, Float64


@dataclass(frozen=True, kw_only=True)
class Euler(Settings):
    """Euler's method with the keys and defaults of diffusers' EulerDiscreteScheduler."""

    unsupported: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"use_beta_sigmas": False, "interpolation_type": "linear", "timestep_type": "discrete"}
    )

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0) -> EulerRun:
        """Begin a run; see `protocol.Scheduler.start`."""
        first = self.check_start(steps, strength, eta)
        timesteps, levels = _linear_schedule(self, steps)
        if self.use_karras_sigmas or self.use_exponential_sigmas:
            spread = sigmas.karras_sigmas if self.use_karras_sigmas else sigmas.exponential_sigmas
            levels = spread(self.sigma_max or float(levels[0]), self.sigma_min or float(levels[-1]), steps)
            timesteps = sigmas.timesteps_of(levels, self.training_sigmas).astype(np.float32)
        last = 0.0 if self.final_sigmas_type == "zero" else float(self.training_sigmas[0])
        return EulerRun(self, timesteps, np.append(levels, last), first)


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Settings):
    """Ancestral sampling with the keys and defaults of diffusers' EulerAncestralDiscreteScheduler."""

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0) -> EulerAncestralRun:
        """Begin a run; see `protocol.Scheduler.start`."""
        first = self.check_start(steps, strength, eta)
        timesteps, levels = _linear_schedule(self, steps)
        return EulerAncestralRun(self, timesteps, np.append(levels, 0.0), first)


def _linear_schedule(scheduler: Settings, steps: int) -> tuple[Float32, Float64]:
    """Timesteps, not rounded, and their noise levels: (steps,) each."""
    spaced = sigmas.spaced_timesteps(
        scheduler.timestep_spacing, steps, scheduler.num_train_timesteps, scheduler.steps_offset
    )
    timesteps = spaced.astype(np.float32)
    return timesteps, sigmas.interpolated_sigmas(timesteps, scheduler.training_sigmas)


class EulerRun(RunBase):
    """One run of Euler's method."""

    def __init__(self, scheduler: Settings, timesteps: Float32, levels: Float64, first: int) -> None:
        """Leave out the `first` of `timesteps`; `levels` are theirs and the one that the last step leads to."""
        largest = float(levels.max())
        if scheduler.timestep_spacing == "leading":  # which starts below the noise level of the last training step
            largest = (largest**2 + 1) ** 0.5
        super().__init__(timesteps[first:], [(1.0, float(level)) for level in levels[first:-1]], largest)
        self._kind = scheduler.prediction_type
        self._sigmas: Float32 = levels[first:].astype(np.float32)

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """`sample` in variance-preserving form."""
        return np.asarray(sample / sigmas.root(self._sigmas[i] ** 2 + 1), dtype=np.float32)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """x + (sigma' - sigma) dx/dsigma: arXiv 2206.00364, Algorithm 1, lines 4 and 5."""
        return sample + self._slope(model_output, i, sample) * np.float32(self._sigmas[i + 1] - self._sigmas[i])

    def _slope(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """dx/dsigma = (x - x_0) / sigma, eqs. 1 and 3 with sigma(t) = t."""
        return np.asarray((sample - self._original(model_output, i, sample)) / self._sigmas[i], dtype=np.float32)

    def _original(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """x_0, by the formulas of `prediction.to_original` in variance-exploding form."""
        sigma = np.float32(self._sigmas[i])
        if self._kind == EPSILON:
            return np.asarray(sample - sigma * model_output)
        if self._kind == V_PREDICTION:
            kept = np.asarray(sample / (sigma**2 + 1), dtype=np.float32)
            return model_output * (-sigma / sigmas.root(sigma**2 + 1)) + kept
        return model_output


class EulerAncestralRun(EulerRun):
    """One run of ancestral sampling: a step to below the next noise level, then fresh noise up to it."""

    def needs_noise(self, i: int) -> bool:
        """Every step but the one to the clean sample."""
        return bool(self._sigmas[i + 1] > 0)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """sigma_up^2 + sigma_down^2 = sigma'^2, with sigma_up the posterior deviation: arXiv 2006.11239, eq. 7."""
        now, after = np.float32(self._sigmas[i]), np.float32(self._sigmas[i + 1])
        up = sigmas.root(after**2 * (now**2 - after**2) / now**2)
        down = sigmas.root(max(after**2 - up**2, np.float32(0)))
        previous = sample + self._slope(model_output, i, sample) * (down - now)
        return previous + required(noise) * up if self.needs_noise(i) else previous
