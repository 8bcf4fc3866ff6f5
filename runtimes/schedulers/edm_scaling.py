"""What the EDM methods share: noise levels, and the preconditioning, which the sampler applies, not the network.

Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION
from runtimes.schedulers.rounding import log, root
from runtimes.schedulers.sampler_run import RunBase
from runtimes.schedulers.settings import WHERE, ThresholdSettings


@dataclass(frozen=True, kw_only=True)
class EdmSettings(ThresholdSettings):
    """The keys that both methods read, with their defaults. Their noise schedule has no betas."""

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION)
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"sigma_schedule": ("karras", "exponential")})
    foreign: ClassVar[frozenset[str]] = frozenset(
        {"beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing", "steps_offset",
         "rescale_betas_zero_snr"}
    )

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    rho: float = 7.0
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be noise levels."""
        if not (0 < self.sigma_min <= self.sigma_max < math.inf and self.sigma_data > 0 and self.rho > 0):
            raise InputError("sigma_min, sigma_max, sigma_data and rho must be positive, sigma_min the lesser",
                             where=WHERE, fix="0.002, 80, 0.5 and 7 are usual")
        super().__post_init__()

    @cached_property
    def alphas_cumprod(self) -> Float32:
        """Share of signal variance at levels from low to high, in place of a training schedule's.

        (num_train_timesteps,) float32, 0 to 1, read-only.
        """
        table = np.asarray(1 / (1 + self.levels_of_ramp(np.linspace(0, 1, self.num_train_timesteps)) ** 2)[::-1],
                           dtype=np.float32)
        table.setflags(write=False)
        return table

    def levels_of_ramp(self, ramp: Float64 | Float32) -> Float32:
        """Noise levels, descending: eq. 5, in the ramp's precision, or evenly spaced in log(sigma): (n,) float32.

        Args:
            ramp: (n,) from 0 to 1, ascending.
        """
        if self.sigma_schedule == "exponential":
            logs = noise_levels.linspace(math.log(self.sigma_min), math.log(self.sigma_max), len(ramp))
            return np.exp(logs.astype(np.float64)).astype(np.float32)[::-1]
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        roots = high + ramp * (low - high)
        return np.asarray(roots.astype(np.float64) ** self.rho, dtype=np.float32)


class EdmRun(RunBase):
    """The frame of a run in variance-exploding form with EDM's preconditioning."""

    def __init__(self, settings: EdmSettings, levels: Float32, first: int) -> None:
        """Leave out the `first` of the steps between `levels`, (n + 1,) float32; a timestep is log(sigma) / 4."""
        timesteps = np.array([np.float32(0.25) * log(level) for level in levels[:-1]], dtype=np.float32)
        super().__init__(timesteps, [(1.0, level) for level in levels[:-1]], first, math.hypot(settings.sigma_max, 1))
        self._data = np.float32(settings.sigma_data**2), np.float32(settings.sigma_data)
        self._sign = 1 if settings.prediction_type == EPSILON else -1
        self._sigmas = levels[first:]

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """c_in x, Table 1."""
        return sample * (np.float32(1) / root(self._sigmas[i] ** 2 + self._data[0]))

    def _denoised(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """x_0 = c_skip x + c_out F, Table 1."""
        sigma, (variance, deviation) = self._sigmas[i], self._data
        skip = variance / (sigma**2 + variance)
        out = np.float32(self._sign) * sigma * deviation / root(sigma**2 + variance)
        denoised: Float32 = skip * sample + out * model_output
        return denoised
