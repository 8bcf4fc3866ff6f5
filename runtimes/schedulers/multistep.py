"""What the solvers in lambda share: schedules of noise levels, and a run that remembers earlier model outputs.

They solve the diffusion ODE or SDE in lambda = log(alpha / sigma) = -log(noise-to-signal ratio).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import limited, to_epsilon, to_original
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.rounding import log, root
from runtimes.schedulers.sampler_run import RunBase
from runtimes.schedulers.settings import WHERE, SpreadSettings, ThresholdSettings

SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")


@dataclass(frozen=True, kw_only=True)
class LambdaSettings(SpreadSettings, ThresholdSettings):
    """The keys that all of these methods read, and the schedule that they make."""

    final_sigmas_type: str = "zero"

    @property
    def last_timestep(self) -> int:
        """One more than the highest training timestep used."""
        return self.num_train_timesteps

    def schedule(self, steps: int) -> tuple[Timesteps, Float32]:
        """Timesteps (n,) int64 and noise levels (n + 1,) float32, the last being where the run ends."""
        if self.spreads:
            levels = self.spread(self.training_sigmas[::-1], steps)
            timesteps = self.rounded(noise_levels.timesteps_of(levels, self.training_sigmas))
        else:
            timesteps = noise_levels.multistep_timesteps(
                self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset, self.last_timestep
            )
            if len(timesteps) == 0:
                raise InputError(f"lambda_min_clipped leaves none of {steps} steps", where=WHERE, fix="lower it")
            levels = noise_levels.interpolated_sigmas(timesteps, self.training_sigmas)
        return timesteps, np.append(levels, self.final_sigma(levels)).astype(np.float32)

    def rounded(self, timesteps: Float64) -> Timesteps:
        """Whole timesteps, (n,) int64, of levels that a formula chose; `timesteps` are (n,) float64.

        As diffusers: those of Karras' levels rounded to the nearest, the others cut off.
        """
        return (timesteps.round() if self.use_karras_sigmas else timesteps).astype(np.int64)

    def final_sigma(self, levels: Float64) -> float:
        """The noise level where a run that visits the noise `levels`, (n,) float64 descending, ends."""
        return 0.0 if self.final_sigmas_type == "zero" else float(self.training_sigmas[0])

    def clipped_timesteps(self, lambda_min: float) -> int:
        """How many training timesteps have a lambda below `lambda_min`: the cosine schedule must leave them out."""
        return int(np.searchsorted(-np.log(self.training_sigmas[::-1]), lambda_min))


@dataclass(frozen=True, kw_only=True)
class MultistepSettings(LambdaSettings):
    """The keys of the solvers whose order can be chosen."""

    # Each class accepts the other's solver_type and takes its own default for it, as diffusers does.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"solver_type": SOLVER_TYPES})

    solver_order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        """Refuse an order below 1."""
        super().__post_init__()
        if self.solver_order < 1:
            raise InputError(f"solver_order = {self.solver_order} is not 1, 2 or 3", where=WHERE, fix="2 is usual")


@dataclass(frozen=True)
class Point:
    """A noise level: signal, noise, and lambda = log(alpha / sigma), infinite without noise."""

    alpha: np.float32
    sigma: np.float32
    lam: np.float32

    @classmethod
    def of(cls, ratio: np.float32) -> Point:
        """The point with a noise-to-signal ratio, in variance-preserving form."""
        alpha = np.float32(1) / root(ratio**2 + np.float32(1))
        sigma = ratio * alpha
        return cls(alpha, sigma, log(alpha) - log(sigma))


class LambdaRun(RunBase):
    """A run that remembers the last model outputs, converted, newest last."""

    def __init__(self, settings: LambdaSettings, steps: int, first: int, memory: int) -> None:
        """Leave out the `first` of `steps` steps; remember `memory` outputs."""
        timesteps, levels = settings.schedule(steps)
        points = [Point.of(level) for level in levels]
        super().__init__(timesteps, [(p.alpha, p.sigma) for p in points[:-1]], first)
        self._points = points[first:]
        self._settings = settings
        self._first, self._total = first, len(timesteps)
        self._memory = memory
        self._outputs: list[Float32] = []

    def _original(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """x_0, thresholded if the settings say so."""
        kind, point = self._settings.prediction_type, self._points[i]
        return limited(self._settings, to_original(kind, model_output, sample, point.alpha, point.sigma))

    def _epsilon(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """The noise."""
        point = self._points[i]
        return to_epsilon(self._settings.prediction_type, model_output, sample, point.alpha, point.sigma)

    def _remember(self, output: Float32) -> None:
        self._outputs = [*self._outputs, output][-self._memory :]


class _Orders(Protocol):
    @property
    def solver_order(self) -> int: ...

    @property
    def lower_order_final(self) -> bool: ...


def order_in_memory(settings: _Orders, i: int, left: int, total: int, *, ends_first: bool) -> int:
    """Order of step i: lower at the start, where few outputs are known, and at the end for stability in few steps.

    Args:
        settings: give the largest order; 3 at most.
        i: steps taken before.
        left: steps to take, this one included.
        total: steps of the whole schedule.
        ends_first: whether the last step is of order 1 however many steps there are.
    """
    few = settings.lower_order_final and total < 15
    if left == 1 and (few or ends_first):
        return 1
    return min(settings.solver_order, 3, i + 1, max(left, 2) if few else 3)
