"""Euler's method over EDM's noise levels: Karras et al., arXiv 2206.00364, Algorithm 1 to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtimes.schedulers.edm_scaling import EdmRun, EdmSettings
from runtimes.schedulers.noise_levels import Float32


@dataclass(frozen=True, kw_only=True)
class EdmEuler(EdmSettings):
    """The method with the keys and defaults of diffusers' EDMEulerScheduler."""

    foreign: ClassVar[frozenset[str]] = EdmSettings.foreign | {
        "thresholding", "dynamic_thresholding_ratio", "sample_max_value"
    }

    def _run(self, steps: int, first: int, eta: float) -> EdmEulerRun:
        levels = self.levels_of_ramp(np.linspace(0, 1, steps))
        last = levels[-1] if self.final_sigmas_type == "sigma_min" else np.float32(0)
        return EdmEulerRun(self, np.append(levels, last), first)


class EdmEulerRun(EdmRun):
    """One run."""

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """x + (sigma' - sigma) (x - x_0) / sigma."""
        slope = (sample - self._denoised(model_output, i, sample)) / np.float32(self._sigmas[i])
        return sample + slope * np.float32(self._sigmas[i + 1] - self._sigmas[i])
