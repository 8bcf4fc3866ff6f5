"""What DPM-Solver++ and UniPC share: their schedules of noise levels, and the frame of a run with a memory.

Both solve the diffusion ODE in lambda = log(alpha / sigma) = -log(noise-to-signal ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import sigmas
from runtimes.schedulers.prediction import to_original
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.settings import WHERE, RunBase, Settings
from runtimes.schedulers.sigmas import Float32, Float64


@dataclass(frozen=True, kw_only=True)
class MultistepSettings(Settings):
    """The keys that both methods read."""

    # Each class accepts the other's solver_type and takes its own default for it, as diffusers does.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")}
    )

    solver_order: int = 2
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        """Refuse what neither method does."""
        super().__post_init__()
        if not 1 <= self.solver_order <= 3:
            raise InputError(f"solver_order = {self.solver_order} is not 1, 2 or 3", where=WHERE, fix="2 is usual")

    @property
    def last_timestep(self) -> int:
        """One more than the highest training timestep used."""
        return self.num_train_timesteps

    def schedule(self, steps: int) -> tuple[Timesteps, Float64]:
        """Timesteps (n,) int64 and noise levels (n + 1,) float64, the last being where the run ends."""
        table = self.training_sigmas
        spread = self.spread(steps)
        if spread is None:
            timesteps = sigmas.multistep_timesteps(
                self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset, self.last_timestep
            )
            levels = sigmas.interpolated_sigmas(timesteps, table)
        else:
            levels = spread
            fractional = sigmas.timesteps_of(levels, table)
            timesteps = (fractional.round() if self.rounds_karras else fractional).astype(np.int64)
        if np.any(np.diff(levels) >= 0):
            raise InputError(f"{steps} steps repeat a noise level", where="steps", fix="take fewer steps")
        return timesteps, np.append(levels, 0.0 if self.final_sigmas_type == "zero" else self.final_sigma(levels))

    def spread(self, steps: int) -> Float64 | None:
        """Noise levels chosen by formula, (steps,) float64, or None where they follow the timesteps."""
        high, low = float(self.training_sigmas[-1]), float(self.training_sigmas[0])
        if self.use_karras_sigmas:
            return sigmas.karras_sigmas(self.sigma_max or high, self.sigma_min or low, steps)
        if self.use_exponential_sigmas:
            return sigmas.exponential_sigmas(self.sigma_max or high, self.sigma_min or low, steps)
        return None

    @property
    def rounds_karras(self) -> bool:
        """Whether timesteps found from noise levels are rounded to nearest; if not, they are cut off."""
        return self.use_karras_sigmas

    def final_sigma(self, levels: Float64) -> float:
        """Where a run with final_sigmas_type "sigma_min" ends."""
        return float(self.training_sigmas[0])


class MultistepRun(RunBase):
    """A run that remembers the last predictions of x_0, newest last."""

    def __init__(self, scheduler: MultistepSettings, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        timesteps, levels = scheduler.schedule(steps)
        if first >= len(timesteps):
            raise InputError("strength leaves no step of this schedule", where="strength", fix="raise it")
        self._sigmas = [float(level) for level in levels[first:].astype(np.float32)]
        self._alphas = [1 / math.hypot(sigma, 1) for sigma in self._sigmas]
        self._lambdas = [-math.log(sigma) if sigma > 0 else math.inf for sigma in self._sigmas]
        levels_of_steps = [(a, a * s) for a, s in zip(self._alphas[:-1], self._sigmas[:-1], strict=True)]
        super().__init__(timesteps[first:], levels_of_steps)
        self._kind = scheduler.prediction_type
        self._first, self._total = first, len(timesteps)
        self._memory = scheduler.solver_order
        self._originals: list[Float32] = []

    def _original(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        alpha = self._alphas[i]
        return to_original(self._kind, model_output, sample, alpha, alpha * self._sigmas[i])

    def _remember(self, original: Float32) -> None:
        self._originals = [*self._originals, original][-self._memory :]
