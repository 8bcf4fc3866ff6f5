"""DPM-Solver, singlestep: Lu et al., DPM-Solver, arXiv 2206.00927, section 3, and DPM-Solver++, arXiv 2211.01095, 4.1.

Steps come in groups of `solver_order`: each of a group starts from where the group began, with the outputs since.
There is one model call a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.dpm_update import ONE, TWO, update
from runtimes.schedulers.methods.dpm_multistep import DpmSolverRun, DpmSolverSettings
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.settings import WHERE


@dataclass(frozen=True, kw_only=True)
class DpmSolverSingle(DpmSolverSettings):
    """DPM-Solver, singlestep, with the keys and defaults of diffusers' DPMSolverSinglestepScheduler."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {**DpmSolverSettings.choices, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis")}
    )
    foreign: ClassVar[frozenset[str]] = frozenset({"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"})

    lower_order_final: bool = False

    def __post_init__(self) -> None:
        """Refuse what diffusers cannot run."""
        super().__post_init__()
        if self.solver_order > 3:
            raise InputError(f"solver_order = {self.solver_order} is not 1, 2 or 3", where=WHERE, fix="2 is usual")
        if self.predicts_noise and self.thresholding:
            raise InputError("thresholding = True is not supported with algorithm_type = 'dpmsolver'", where=WHERE,
                             fix="set thresholding to false or algorithm_type to dpmsolver++")

    def orders(self, steps: int) -> list[int]:
        """The order of each step: 1, 2, 3, 1, 2, 3, ...

        It ends lower where steps are left over or the last one is to zero noise."""
        size = self.solver_order
        whole = [1 + k % size for k in range(steps)]
        if not self.lower_order_final and steps % size == 0 and self.final_sigmas_type != "zero":
            return whole
        if size == 3 and steps % 3 == 0:
            whole[-3:] = [1, 2, 1]
        elif size == 2 and steps % 2 == 0:
            whole[-2:] = [1, 1]
        if self.final_sigmas_type == "zero":
            whole[-1] = 1
        return whole

    def _run(self, steps: int, first: int, eta: float) -> DpmSolverSingleRun:
        return DpmSolverSingleRun(self, steps, first)


class DpmSolverSingleRun(DpmSolverRun):
    """One run of the singlestep method."""

    def __init__(self, settings: DpmSolverSingle, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first)
        self._heun = settings.solver_type == "heun"
        self._base: Float32 | None = None  # the sample that the group of steps under way started from
        for i, order in enumerate(settings.orders(steps)[first:]):
            order = min(order, i + 1)
            base, *later, target = self._points[i + 1 - order : i + 2]
            with np.errstate(all="ignore"):
                h = target.lam - base.lam
                ratios = tuple((point.lam - base.lam) / h for point in reversed(later))
            made = update(settings.algorithm, self._heun, order, base, target, ratios)
            self._updates.append(made if self._heun else replace(made, outputs=made.outputs[:2]))
        self._check_finite()

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """From where the group began to lambda_{i+1}."""
        self._in_order(i)
        self._remember(self._converted(model_output, i, sample))
        update = self._updates[i]
        if not update.ratios:
            self._base = sample
        assert self._base is not None
        return update(self._base, self._differences(update.ratios), noise)

    def _differences(self, ratios: tuple[np.float32, ...]) -> list[Float32]:
        """D0, D1, D2 of a group; `ratios` are the places of its outputs but the first, newest first."""
        newest = self._outputs[::-1]
        if len(ratios) == 0:
            return [newest[0]]
        if len(ratios) == 1:
            return [newest[1], (ONE / ratios[0]) * (newest[0] - newest[1])]
        far: Float32 = (ONE / ratios[0]) * (newest[0] - newest[2])
        if not self._heun:
            return [newest[2], far]
        near: Float32 = (ONE / ratios[1]) * (newest[1] - newest[2])
        apart = ratios[0] - ratios[1]
        bent: Float32 = ratios[0] * near - ratios[1] * far
        return [newest[2], np.asarray(bent / apart), np.asarray(TWO * (far - near) / apart)]
