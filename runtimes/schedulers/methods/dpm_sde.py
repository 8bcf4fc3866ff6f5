"""DPM-Solver++ (2S) with Brownian noise: k-diffusion's `sample_dpmpp_sde`. Two model calls a step, one for the last.

Both calls of a step take their noise from one Brownian path: the second's, over the whole step, holds the first's, over
its first part. Here the path is made of independent normal increments, one for each call; diffusers samples it by
torchsde's Brownian tree, from a seed of its own. The two are one in law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.rounding import exp, expm1, log, root
from runtimes.schedulers.sampler_run import required
from runtimes.schedulers.variance_exploding import ExplodingRun, SecondOrderSettings, doubled


@dataclass(frozen=True, kw_only=True)
class DpmSde(SecondOrderSettings):
    """The method with the keys and defaults of diffusers' DPMSolverSDEScheduler."""

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION)
    # Its numbers are torchsde's.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({"noise_sampler_seed": (None,)})
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    karras_limits: ClassVar[bool] = False
    order: ClassVar[int] = 2

    def _run(self, steps: int, first: int, eta: float) -> DpmSdeRun:
        timesteps, levels = self.schedule(steps)
        calls = np.empty(2 * len(timesteps) - 1, dtype=np.float32)
        calls[::2] = timesteps
        logs = np.log(levels[:-1])
        calls[1::2] = noise_levels.timesteps_of(np.exp((logs[:-1] + logs[1:]) / 2), self.training_sigmas)
        return DpmSdeRun(self, calls, np.append(doubled(levels[:-1].astype(np.float32)), np.float32(0)), first)

    def schedule(self, steps: int) -> tuple[Float32 | Float64, Float64]:
        """As `SecondOrderSettings.schedule`, always float64: timesteps (steps,), noise levels (steps + 1,)."""
        timesteps: Float64 = noise_levels.spaced_timesteps(
            self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset
        )
        levels = noise_levels.interpolated_sigmas(timesteps, self.training_sigmas)
        if self.spreads:
            levels = self.spread(levels, steps)
            timesteps = noise_levels.timesteps_of(levels, self.training_sigmas)
        return timesteps, np.append(levels, 0.0)


class DpmSdeRun(ExplodingRun):
    """One run."""

    def __init__(self, settings: DpmSde, timesteps: Float32, levels: Float32, first: int) -> None:
        """Call the model at `timesteps`."""
        super().__init__(settings, timesteps, levels, first)
        self._before: tuple[Float32, Float32, np.float32] | None = None  # sample, noise and level of half a step

    def input_sigma(self, i: int) -> np.float32:
        """Of a step's own level, then of its middle."""
        return np.float32(self._sigmas[i]) if i % 2 == 0 else self._middle(i - 1)

    def needs_noise(self, i: int) -> bool:
        """Every call but the last."""
        return i + 1 < len(self.timesteps)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Half a step, then the whole one with the x_0 found in its middle; plain Euler to the clean sample."""
        self._in_order(i)
        if not self.needs_noise(i):
            return sample - self._slope(model_output, i, sample) * np.float32(self._sigmas[i])
        original, fresh = self._original(model_output, i, sample), required(noise)
        if self._before is None:
            middle = self._middle(i)
            self._before = sample, fresh, middle
            return _diffused(self._sigmas[i], middle, sample, original, fresh)
        start, earlier, middle = self._before
        self._before = None
        now, after = self._sigmas[i - 1], self._sigmas[i]
        path = np.sqrt(now - middle) * earlier + np.sqrt(middle - after) * fresh
        return _diffused(now, exp(log(after)), start, original, np.asarray(path / np.sqrt(now - after)))

    def _middle(self, i: int) -> np.float32:
        """The geometric mean of the levels of the step whose first call is i."""
        t, after = -log(self._sigmas[i]), -log(self._sigmas[i + 1])
        return exp(-(t + (after - t) * np.float32(0.5)))


def _diffused(now: np.float32, after: np.float32, sample: Float32, original: Float32, noise: Float32) -> Float32:
    """From level `now` to below `after` by the exponential integrator, then up to it with noise."""
    t = -log(now)
    now = exp(-t)
    up = min(after, root(after**2 * (now**2 - after**2) / now**2))
    down = -log(root(after**2 - up**2))
    moved: Float32 = exp(-down) / now * sample - expm1(t - down) * original
    return moved + noise * up
