"""Euler's method: Karras et al., arXiv 2206.00364, Algorithm 1 with the first-order step alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers import noise_levels
from runtimes.schedulers.prediction import V_PREDICTION
from runtimes.schedulers.rounding import log
from runtimes.schedulers.settings import Settings, SpreadSettings
from runtimes.schedulers.variance_exploding import EulerRun, linear_schedule


@dataclass(frozen=True, kw_only=True)
class Euler(SpreadSettings):
    """Euler's method with the keys and defaults of diffusers' EulerDiscreteScheduler."""

    predictions: ClassVar[tuple[str, ...]] = (*Settings.predictions, "original_sample")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous")}
    )

    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"

    def _run(self, steps: int, first: int, eta: float) -> EulerRun:
        timesteps, levels = linear_schedule(self, steps)
        if self.interpolation_type == "log_linear":  # one level more: such a run ends above the last level
            logs = np.log(self.training_sigmas)
            levels = np.exp(noise_levels.linspace(float(logs[-1]), float(logs[0]), steps + 1)).astype(np.float64)
        if self.spreads:
            levels = self.spread(levels, steps)
            timesteps = noise_levels.timesteps_of(levels, self.training_sigmas).astype(np.float32)
        last = 0.0 if self.final_sigmas_type == "zero" else self.training_sigmas[0]
        all_levels = np.append(levels, last).astype(np.float32)
        if self.timestep_type == "continuous" and self.prediction_type == V_PREDICTION:  # EDM's c_noise, Table 1
            timesteps = np.array([np.float32(0.25) * log(level) for level in all_levels[:-1]], dtype=np.float32)
        return EulerRun(self, timesteps, all_levels, first)
