"""DPM-Solver, multistep: Lu et al., DPM-Solver++, arXiv 2211.01095, Algorithm 2 (2M), order 1 to 3; as ODE or SDE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import noise_levels
from runtimes.schedulers.dpm_update import ALGORITHMS, Update, differences, multistep_update
from runtimes.schedulers.multistep import LambdaRun, MultistepSettings, order_in_memory
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.settings import FLOW, FLOW_INERT, WHERE, not_finite

# Of what diffusers takes as `variance_type`, learned variances mean a model with outputs of their own.
NOT_LEARNED = (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


@dataclass(frozen=True, kw_only=True)
class DpmSolverSettings(MultistepSettings):
    """The keys that the multistep and the singlestep method share."""

    # deis is read as dpmsolver++, as diffusers does.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {**MultistepSettings.choices, "algorithm_type": (*ALGORITHMS, "deis")}
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({**FLOW, "variance_type": NOT_LEARNED})
    inert: ClassVar[frozenset[str]] = FLOW_INERT | {"use_dynamic_shifting"}  # it needs a `mu`, which pipelines pass

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lambda_min_clipped: float = -math.inf

    def __post_init__(self) -> None:
        """Refuse what diffusers refuses."""
        super().__post_init__()
        if self.predicts_noise and self.final_sigmas_type == "zero":
            raise InputError(
                f"final_sigmas_type = 'zero' is not finite with algorithm_type = {self.algorithm_type!r}",
                where=WHERE,
                fix="set final_sigmas_type to sigma_min or algorithm_type to dpmsolver++",
            )

    @property
    def algorithm(self) -> str:
        """One of `dpm_update.ALGORITHMS`."""
        return "dpmsolver++" if self.algorithm_type == "deis" else self.algorithm_type

    @property
    def predicts_noise(self) -> bool:
        """Whether the memory holds noise in place of clean samples."""
        return self.algorithm in ("dpmsolver", "sde-dpmsolver")

    @property
    def stochastic(self) -> bool:
        """Whether the SDE is solved, with fresh noise at each step."""
        return self.algorithm.startswith("sde-")

    @property
    def last_timestep(self) -> int:
        """Training timesteps with lambda below lambda_min_clipped are left out."""
        return self.num_train_timesteps - self.clipped_timesteps(self.lambda_min_clipped)


@dataclass(frozen=True, kw_only=True)
class DpmSolverPP(DpmSolverSettings):
    """DPM-Solver, multistep, with the keys and defaults of diffusers' DPMSolverMultistepScheduler."""

    euler_at_final: bool = False
    use_lu_lambdas: bool = False

    @property
    def spreads(self) -> bool:
        """Lu's lambdas are a formula too."""
        return super().spreads or self.use_lu_lambdas

    def spread(self, levels: Float64 | Float32, steps: int) -> Float64:
        """Karras' formula before Lu's, the others after: noise levels (steps,) float64."""
        if self.use_lu_lambdas and not self.use_karras_sigmas:
            return noise_levels.lu_sigmas(self.training_sigmas, steps)
        return super().spread(levels, steps)

    def rounded(self, timesteps: Float64) -> Timesteps:
        """Timesteps (n,) int64 of (n,) float64 ones: rounded to the nearest or cut off, as diffusers does.

        Those of Karras' and Lu's levels are rounded, but not over the cosine schedule.
        """
        nearest = (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2"
        return (timesteps.round() if nearest else timesteps).astype(np.int64)

    def _run(self, steps: int, first: int, eta: float) -> DpmSolverPPRun:
        return DpmSolverPPRun(self, steps, first)


class DpmSolverRun(LambdaRun):
    """What the multistep and the singlestep method share."""

    def __init__(self, settings: DpmSolverSettings, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first, memory=3)
        self._solver = settings
        self._updates: list[Update] = []

    def needs_noise(self, i: int) -> bool:
        """Every step of the SDE but one to the clean sample."""
        return self._solver.stochastic and bool(self._points[i + 1].sigma > 0)

    def _check_finite(self) -> None:
        """Refuse coefficients that are not numbers, but those of a step of no length, which changes nothing."""
        for i, update in enumerate(self._updates):
            if not update.usable(self._stands(i)):
                raise not_finite(len(self.timesteps), i)

    def _stands(self, i: int) -> bool:
        """Whether step i has no length: karras sigmas with final_sigmas_type sigma_min end with one."""
        return bool(self._points[i + 1].lam == self._points[i].lam)

    def _converted(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """The clean sample or the noise, whichever the algorithm remembers."""
        config = self._solver
        if not config.predicts_noise:
            return self._original(model_output, i, sample)
        epsilon = self._epsilon(model_output, i, sample)
        if not config.thresholding:
            return epsilon
        point = self._points[i]
        original = self._original(epsilon if config.prediction_type == EPSILON else model_output, i, sample)
        return np.asarray((sample - point.alpha * original) / point.sigma)


class DpmSolverPPRun(DpmSolverRun):
    """One run of the multistep method."""

    def __init__(self, settings: DpmSolverPP, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first)
        heun = settings.solver_type == "heun"
        ends_first = settings.euler_at_final or settings.final_sigmas_type == "zero"
        count = len(self.timesteps)
        for i in range(count):
            order = order_in_memory(settings, i, count - i, self._total, ends_first=ends_first)
            self._updates.append(multistep_update(settings.algorithm, heun, order, self._points[max(i - 2, 0) : i + 2]))
        self._check_finite()

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """One step from lambda_i to lambda_{i+1}: eq. 8 of the paper with k = order; the SDE doubles h."""
        self._in_order(i)
        self._remember(self._converted(model_output, i, sample))
        if self._stands(i):
            return sample
        update = self._updates[i]
        return update(sample, differences(self._outputs, update.ratios), noise)
