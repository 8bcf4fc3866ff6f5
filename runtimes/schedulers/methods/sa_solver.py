"""SA-Solver: Xue et al., Stochastic Adams Solver for Fast Sampling of Diffusion Models, arXiv 2305.05844.

A stochastic Adams-Bashforth predictor and an Adams-Moulton corrector, in data or in noise prediction, with fresh noise
(tau = 1) between timesteps 200 and 800, and none outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.methods.dpm_multistep import NOT_LEARNED
from runtimes.schedulers.multistep import LambdaRun, LambdaSettings, Point
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.rounding import exp, root
from runtimes.schedulers.sampler_run import required
from runtimes.schedulers.settings import FLOW, FLOW_INERT, WHERE, not_finite

NOISY = (200, 800)


@dataclass(frozen=True, kw_only=True)
class SaSolver(LambdaSettings):
    """The method with the keys and defaults of diffusers' SASolverScheduler."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"algorithm_type": ("data_prediction", "noise_prediction")}
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType(
        {**FLOW, "variance_type": NOT_LEARNED, "tau_func": (None,)}
    )
    inert: ClassVar[frozenset[str]] = FLOW_INERT
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr", "final_sigmas_type"})

    predictor_order: int = 2
    corrector_order: int = 2
    lower_order_final: bool = True
    algorithm_type: str = "data_prediction"
    lambda_min_clipped: float = -np.inf

    def __post_init__(self) -> None:
        """Refuse what diffusers cannot run."""
        super().__post_init__()
        if not (1 <= self.predictor_order <= 4 and 1 <= self.corrector_order <= 4):
            raise InputError("predictor_order and corrector_order must be 1 to 4", where=WHERE, fix="2 is usual")
        if self.thresholding and not self.predicts_original:
            raise InputError("thresholding = True is not supported with algorithm_type = 'noise_prediction'",
                             where=WHERE, fix="set thresholding to false or algorithm_type to data_prediction")

    @property
    def predicts_original(self) -> bool:
        """Whether the memory holds clean samples, not noise."""
        return self.algorithm_type == "data_prediction"

    @property
    def last_timestep(self) -> int:
        """Training timesteps with lambda below lambda_min_clipped are left out."""
        return self.num_train_timesteps - self.clipped_timesteps(self.lambda_min_clipped)

    def final_sigma(self, levels: Float64) -> float:
        """The lowest level of the run where levels are chosen by formula, else of the training schedule."""
        return float(levels[-1]) if self.spreads else float(self.training_sigmas[0])

    def _run(self, steps: int, first: int, eta: float) -> SaSolverRun:
        return SaSolverRun(self, steps, first)


class SaSolverRun(LambdaRun):
    """One run of SA-Solver."""

    def __init__(self, settings: SaSolver, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first, memory=max(settings.predictor_order, settings.corrector_order - 1))
        # (alpha, sigma) that noise is added to an image at; those of samples are `_points`
        self._levels = settings.visited(self.timesteps.astype(np.int64), 0, clips=True)[1]
        self._solver = settings
        self._before: tuple[Float32, Float32] | None = None  # sample and noise of the step before
        count = len(self.timesteps)
        self._predictors = [self._weights(i, min(settings.predictor_order, self._left(i), i + 1)) for i in range(count)]
        self._correctors = [
            self._weights(i, min(settings.corrector_order, self._left(i) + 1, i + 2), ahead=True)
            for i in range(count - 1)
        ]
        for i, weights in enumerate(self._predictors):
            if not np.all(np.isfinite([*weights, *(self._correctors[i] if i + 1 < count else ())])):
                raise not_finite(count, i)

    def _left(self, i: int) -> int:
        return len(self.timesteps) - i if self._solver.lower_order_final else 4

    def needs_noise(self, i: int) -> bool:
        """Every step, used or not, as diffusers samples it."""
        return True

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """The step before, corrected with what the model says at its end; then the next one."""
        self._in_order(i)
        convert = self._original if self._solver.predicts_original else self._epsilon
        output = convert(model_output, i, sample)
        if self._before is not None:
            sample = self._taken(i - 1, self._correctors[i - 1], [output, *self._outputs[::-1]], *self._before)
        self._remember(output)
        self._before = sample, required(noise)
        return self._taken(i, self._predictors[i], self._outputs[::-1], *self._before)

    def _tau(self, i: int) -> int:
        return int(NOISY[0] <= self.timesteps[i] <= NOISY[1])

    def _taken(
        self, i: int, weights: Sequence[np.float32], outputs: Sequence[Float32], sample: Float32, noise: Float32
    ) -> Float32:
        """Eq. 14 or 17 of the paper: from point i to point i + 1."""
        s, t, tau = self._points[i], self._points[i + 1], self._tau(i)
        moved: Float32 = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=False):
            moved = moved + weight * output
        h, one = t.lam - s.lam, np.float32(1)
        if self._solver.predicts_original:
            stays = exp(-np.float32(tau) * h) * (t.sigma / s.sigma)
            fresh = t.sigma * root(one - exp(np.float32(-2 * tau) * h))
        else:
            stays = t.alpha / s.alpha
            fresh = np.float32(tau) * t.sigma * root(exp(np.float32(2) * h) - one)
        return stays * sample + moved + fresh * noise

    def _weights(self, i: int, order: int, *, ahead: bool = False) -> list[np.float32]:
        """What each output, newest first, adds to the step from point i; `ahead` counts the one at its end."""
        s, t, square = self._points[i], self._points[i + 1], np.float32(self._tau(i))
        last = i + 1 if ahead else i
        places = [self._points[last - k].lam for k in range(order)]
        with np.errstate(all="ignore"):
            gamma = np.float32(1) + square
            if not self._solver.predicts_original:
                integrals = [_falling(k, s.lam, t.lam) for k in range(order)]
                return [-gamma * t.alpha * weight for weight in _combined(places, integrals)]
            weights = _combined(places, [_rising(k, s.lam, t.lam, gamma) for k in range(order)])
            if order == 2:  # eq. 65 of the paper's appendix: an equally accurate pair of weights for few steps
                bend = self._bend(s, t, gamma, s.lam - self._points[i - 1].lam if not ahead else None)
                weights = [weights[0] + bend, weights[1] - bend]
            return [gamma * t.sigma * exp(-square * t.lam) * weight for weight in weights]

    @staticmethod
    def _bend(s: Point, t: Point, gamma: np.float32, before: np.float32 | None) -> np.float32:
        """The predictor's, over the length `before` of the step before, or the corrector's."""
        h, one, two = t.lam - s.lam, np.float32(1), np.float32(2)
        rest = h * gamma - one + exp(gamma * -h)
        if before is None:
            return exp(gamma * t.lam) * (h / two - rest / (gamma**2 * h))
        return exp(gamma * t.lam) * (h**2 / two - rest / gamma**2) / before


def _combined(places: Sequence[np.float32], integrals: Sequence[np.float32]) -> list[np.float32]:
    """Integrals of the Lagrange polynomials over `places`, from those of the powers of lambda, lowest first."""
    weights = []
    for k, place in enumerate(places):
        others = [other for index, other in enumerate(places) if index != k]
        below = np.float32(1)
        for other in others:
            below = below * (place - other)
        total = np.float32(0)
        for numerator, integral in zip(_symmetric(others), reversed(integrals), strict=True):
            total = total + numerator / below * integral
        weights.append(total)
    return weights


def _symmetric(roots: Sequence[np.float32]) -> list[np.float32]:
    """Coefficients of the polynomial with up to three roots, highest power first."""
    if not roots:
        return [np.float32(1)]
    total = -roots[0]
    for value in roots[1:]:
        total = total - value
    if len(roots) == 1:
        return [np.float32(1), total]
    if len(roots) == 2:
        return [np.float32(1), total, roots[0] * roots[1]]
    a, b, c = roots
    return [np.float32(1), total, a * b + a * c + b * c, -a * b * c]


def _rising(power: int, start: np.float32, end: np.float32, gamma: np.float32) -> np.float32:
    """Integral of exp(gamma x) x^power from `start` to `end`, in diffusers' form."""
    low, high = gamma * start, gamma * end
    tail = exp(-(high - low))
    return exp(high) * (_alternating(power, high) - _alternating(power, low) * tail) / gamma ** (power + 1)


def _falling(power: int, start: np.float32, end: np.float32) -> np.float32:
    """Integral of exp(-x) x^power from `start` to `end`, in diffusers' form."""
    return exp(-end) * (_rooted(power, start) * exp(end - start) - _rooted(power, end))


def _alternating(power: int, x: np.float32) -> np.float32:
    """x^n - n x^(n-1) + n (n-1) x^(n-2) - ...: exp(x) times it is the antiderivative of exp(x) x^n."""
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    return (one, x - one, x**2 - two * x + two, x**3 - three * x**2 + six * x - six)[power]


def _rooted(power: int, x: np.float32) -> np.float32:
    """The same with plus signs: -exp(-x) times it is the antiderivative of exp(-x) x^n."""
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    return (one, x + one, x**2 + two * x + two, x**3 + three * x**2 + six * x + six)[power]
