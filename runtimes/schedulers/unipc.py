"""UniPC: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling, arXiv 2302.04867.

In data prediction. UniP steps ahead; when the model has been asked at the new point, UniC corrects that step with the
answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.multistep import MultistepRun, MultistepSettings
from runtimes.schedulers.settings import WHERE
from runtimes.schedulers.sigmas import Float32, Float64


@dataclass(frozen=True, kw_only=True)
class UniPc(MultistepSettings):
    """UniPC with the keys and defaults of diffusers' UniPCMultistepScheduler."""

    unsupported: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "thresholding": False,
            "predict_x0": True,
            "solver_p": None,
            "use_beta_sigmas": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
            "shift_terminal": None,
        }
    )

    solver_type: str = "bh2"
    disable_corrector: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what the method does not do."""
        super().__post_init__()
        if self.solver_order > 1 and self.final_sigmas_type == "zero" and not self.lower_order_final:
            raise InputError("a step to zero noise is not finite at order 2", where=WHERE, fix="set lower_order_final")

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0) -> UniPcRun:
        """Begin a run; see `protocol.Scheduler.start`."""
        return UniPcRun(self, steps, self.check_start(steps, strength, eta))

    def final_sigma(self, levels: Float64) -> float:
        """The lowest level of the run where levels are chosen by formula, else of the training schedule."""
        by_formula = self.use_karras_sigmas or self.use_exponential_sigmas
        return float(levels[-1]) if by_formula else super().final_sigma(levels)


class UniPcRun(MultistepRun):
    """One run of UniPC."""

    def __init__(self, scheduler: UniPc, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(scheduler, steps, first)
        self._scheduler = scheduler
        self._before: tuple[Float32, int] | None = None  # sample and order of the step before

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """UniC-p on the step before, then UniP-p on this one."""
        self._in_order(i)
        original = self._original(model_output, i, sample)
        if self._before is not None and self._first + i - 1 not in self._scheduler.disable_corrector:
            sample = self._update(i - 1, *self._before, ahead=original)
        self._remember(original)
        order = self._order(i)
        self._before = sample, order
        return self._update(i, sample, order)

    def _order(self, i: int) -> int:
        """Lower at the start for want of a memory, and at the end for stability."""
        left = self._total - self._first - i if self._scheduler.lower_order_final else self._scheduler.solver_order
        return min(self._scheduler.solver_order, i + 1, left)

    def _update(self, i: int, sample: Float32, order: int, ahead: Float32 | None = None) -> Float32:
        """From lambda_i to lambda_{i+1}: UniP, or with the prediction `ahead` at lambda_{i+1}, UniC (section 3.1)."""
        h = self._lambdas[i + 1] - self._lambdas[i]
        if h == 0:
            return sample
        newest = self._originals[-1]
        ratios = [(self._lambdas[i - k] - self._lambdas[i]) / h for k in range(1, order)]
        slopes = [(self._originals[-1 - k] - newest) / ratios[k - 1] for k in range(1, order)]
        if ahead is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, ahead - newest]
        scale = -h if self._scheduler.solver_type == "bh1" else math.expm1(-h)
        alpha = self._alphas[i + 1]
        result = alpha * self._sigmas[i + 1] / (self._alphas[i] * self._sigmas[i]) * sample
        result = result - alpha * math.expm1(-h) * newest
        for weight, slope in zip(_weights(ratios, -h, scale), slopes, strict=True):
            result = result - alpha * scale * weight * slope
        return result


def _weights(ratios: list[float], h: float, scale: float) -> list[float]:
    """Solve R(ratios) weights = phi(h) / B(h), Theorem 3.1; one unknown takes 1/2 in place of the exact solution."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    right, factorial, phi = [], 1, math.expm1(h) / h - 1
    for k in range(1, len(ratios) + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    return [float(weight) for weight in np.linalg.solve(np.vander(ratios, increasing=True).T, right)]
