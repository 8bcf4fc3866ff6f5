"""DPM-Solver++ over EDM's noise levels: Lu et al., arXiv 2211.01095, Algorithm 2, in variance-exploding form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import noise_levels
from runtimes.schedulers.dpm_update import differences, multistep_update
from runtimes.schedulers.edm_scaling import EdmRun, EdmSettings
from runtimes.schedulers.multistep import SOLVER_TYPES, Point, order_in_memory
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import limited
from runtimes.schedulers.rounding import log
from runtimes.schedulers.settings import WHERE, not_finite


@dataclass(frozen=True, kw_only=True)
class EdmDpmSolverPP(EdmSettings):
    """The method with the keys and defaults of diffusers' EDMDPMSolverMultistepScheduler."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            **EdmSettings.choices,
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
            "solver_type": SOLVER_TYPES,
        }
    )

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        """Refuse an order below 1."""
        super().__post_init__()
        if self.solver_order < 1:
            raise InputError(f"solver_order = {self.solver_order} is not 1, 2 or 3", where=WHERE, fix="2 is usual")

    @property
    def stochastic(self) -> bool:
        """Whether the SDE is solved, with fresh noise at each step."""
        return self.algorithm_type == "sde-dpmsolver++"

    def _run(self, steps: int, first: int, eta: float) -> EdmDpmSolverPPRun:
        levels = self.levels_of_ramp(noise_levels.linspace(0, 1, steps))
        last = np.float32(self.sigma_min if self.final_sigmas_type == "sigma_min" else 0)
        return EdmDpmSolverPPRun(self, np.append(levels, last), first)


class EdmDpmSolverPPRun(EdmRun):
    """One run."""

    def __init__(self, settings: EdmDpmSolverPP, levels: Float32, first: int) -> None:
        """Leave out the `first` of the steps between `levels`."""
        super().__init__(settings, levels, first)
        self._solver = settings
        self._outputs: list[Float32] = []
        points = self._points = [Point(np.float32(1), level, -log(level)) for level in self._sigmas]
        algorithm = "sde-dpmsolver++" if settings.stochastic else "dpmsolver++"
        ends_first = settings.euler_at_final or settings.final_sigmas_type == "zero"
        count = len(self.timesteps)
        self._updates = []
        for i in range(count):
            order = order_in_memory(settings, i, count - i, len(levels) - 1, ends_first=ends_first)
            if order == 3 and settings.stochastic:
                raise InputError("sde-dpmsolver++ has no third order over EDM's noise levels", where=WHERE,
                                 fix="set solver_order to 2")
            heun = settings.solver_type == "heun"
            self._updates.append(multistep_update(algorithm, heun, order, points[max(i - 2, 0) : i + 2]))
            if not self._updates[i].usable(self._stands(i)):
                raise not_finite(count, i)

    def needs_noise(self, i: int) -> bool:
        """Every step of the SDE but one to the clean sample."""
        return self._solver.stochastic and bool(self._sigmas[i + 1] > 0)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """One step from lambda_i to lambda_{i+1}, as `dpm_multistep` takes it."""
        self._in_order(i)
        self._outputs = [*self._outputs, limited(self._solver, self._denoised(model_output, i, sample))][-3:]
        if self._stands(i):
            return sample
        update = self._updates[i]
        return update(sample, differences(self._outputs, update.ratios), noise)

    def _stands(self, i: int) -> bool:
        """Whether step i has no length, as the last one of final_sigmas_type sigma_min."""
        return bool(self._points[i + 1].lam == self._points[i].lam)
