"""UniPC: Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling, arXiv 2302.04867.

UniP steps ahead; when the model has been asked at the new point, UniC corrects that step with the answer. In data
prediction (predict_x0) or in noise prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers.multistep import LambdaRun, MultistepSettings
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.rounding import expm1
from runtimes.schedulers.settings import FLOW, FLOW_INERT, not_finite


@dataclass(frozen=True, kw_only=True)
class UniPc(MultistepSettings):
    """UniPC with the keys and defaults of diffusers' UniPCMultistepScheduler."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {**FLOW, "use_dynamic_shifting": (False,), "shift_terminal": (None,), "solver_p": (None,)}
    )
    inert: ClassVar[frozenset[str]] = FLOW_INERT

    solver_type: str = "bh2"
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()

    def final_sigma(self, levels: Float64) -> float:
        """The lowest level of the run where levels are chosen by formula, else of the training schedule."""
        if self.final_sigmas_type == "zero":
            return 0.0
        return float(levels[-1]) if self.spreads else float(self.training_sigmas[0])

    def _run(self, steps: int, first: int, eta: float) -> UniPcRun:
        return UniPcRun(self, steps, first)


@dataclass(frozen=True)
class _Step:
    """Coefficients of UniP or UniC: x_t = sample * x + newest * m0 + scale * (sum of weights * slopes).

    Slopes are (m_k - m0) / ratios[k]; UniC's last one, of the prediction ahead, has no ratio.
    """

    sample: np.float32
    newest: np.float32
    scale: np.float32
    weights: tuple[np.float32, ...]
    ratios: tuple[np.float32, ...]

    def usable(self, stands: bool = False) -> bool:
        """As `dpm_update.Update.usable`."""
        if stands:
            return not np.any(np.isnan(self.ratios))
        numbers = [self.sample, self.newest, self.scale, *self.weights, *self.ratios]
        return bool(np.all(np.isfinite(numbers))) and all(ratio != 0 for ratio in self.ratios)


class UniPcRun(LambdaRun):
    """One run of UniPC."""

    def __init__(self, settings: UniPc, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first, memory=settings.solver_order)
        self._solver = settings
        self._before: Float32 | None = None  # the sample of the step before
        count = len(self.timesteps)
        self._orders = [self._order(i) for i in range(count)]
        self._predictors = [self._coefficients(i, corrects=False) for i in range(count)]
        self._correctors = [self._coefficients(i, corrects=True) for i in range(count - 1)]
        for i, step in enumerate(self._predictors):
            corrects = i + 1 < count and self._corrects(i)
            if not step.usable(self._stands(i)) or (corrects and not self._correctors[i].usable()):
                raise not_finite(count, i)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """UniC-p on the step before, then UniP-p on this one."""
        self._in_order(i)
        if self._solver.predict_x0:
            output = self._original(model_output, i, sample)
        else:
            output = self._epsilon(model_output, i, sample)
        if self._before is not None and self._corrects(i - 1):
            sample = self._taken(self._correctors[i - 1], self._before, ahead=output)
        self._remember(output)
        self._before = sample
        return sample if self._stands(i) else self._taken(self._predictors[i], sample)

    def _stands(self, i: int) -> bool:
        """Whether step i has no length, and so changes nothing: formulas end with one under sigma_min."""
        return bool(self._points[i + 1].lam == self._points[i].lam)

    def _corrects(self, i: int) -> bool:
        """Whether step i is corrected; numbers of steps count from the head of the schedule."""
        return self._first + i not in self._solver.disable_corrector

    def _order(self, i: int) -> int:
        """Lower at the start, where few outputs are known, and at the end for stability."""
        left = len(self.timesteps) - i if self._solver.lower_order_final else self._solver.solver_order
        return min(self._solver.solver_order, i + 1, left)

    def _coefficients(self, i: int, *, corrects: bool) -> _Step:
        """UniP or UniC (section 3.1) from point i to point i + 1, in float32 and diffusers' order."""
        order, s, t = self._orders[i], self._points[i], self._points[i + 1]
        with np.errstate(all="ignore"):
            h = t.lam - s.lam
            ratios = tuple((self._points[i - k].lam - s.lam) / h for k in range(1, order))
            signed = -h if self._solver.predict_x0 else h
            scale = signed if self._solver.solver_type == "bh1" else expm1(signed)
            weights = _weights([*ratios, np.float32(1)], signed, scale, corrects=corrects)
            factor, sample = (t.alpha, t.sigma / s.sigma) if self._solver.predict_x0 else (t.sigma, t.alpha / s.alpha)
            return _Step(sample, -(factor * expm1(signed)), -(factor * scale), weights, ratios)

    def _taken(self, step: _Step, sample: Float32, ahead: Float32 | None = None) -> Float32:
        """UniP, or with the prediction `ahead` at the end of the step, UniC."""
        newest = self._outputs[-1]
        slopes = [(self._outputs[-2 - k] - newest) / ratio for k, ratio in enumerate(step.ratios)]
        if ahead is not None:
            slopes.append(ahead - newest)
        result: Float32 = step.sample * sample + step.newest * newest
        if not slopes:
            return result
        bend: Float32 = step.weights[0] * slopes[0]
        for weight, slope in zip(step.weights[1:], slopes[1:], strict=True):
            bend = bend + weight * slope
        return result + step.scale * bend


def _weights(ratios: list[np.float32], h: np.float32, scale: np.float32, *, corrects: bool) -> tuple[np.float32, ...]:
    """Solve R(ratios) weights = phi(h) / B(h), Theorem 3.1; one unknown takes 1/2 in place of the exact solution.

    UniP leaves out the last ratio, which is 1, and the last equation.
    """
    count = len(ratios) if corrects else len(ratios) - 1
    if count < 2:
        return (np.float32(0.5),) * count
    right, factorial, phi = [], 1, expm1(h) / h - np.float32(1)
    for k in range(1, count + 1):
        right.append(phi * np.float32(factorial) / scale)
        factorial *= k + 1
        phi = phi / h - np.float32(1 / factorial)
    table = np.array(ratios[:count], dtype=np.float32) ** np.arange(count, dtype=np.float32)[:, None]
    if not np.all(np.isfinite(table)) or not np.all(np.isfinite(right)):
        return (np.float32(np.nan),) * count
    try:
        return tuple(np.linalg.solve(table, np.array(right, dtype=np.float32)))
    except np.linalg.LinAlgError:
        return (np.float32(np.nan),) * count
