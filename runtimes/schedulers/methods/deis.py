"""DEIS: Zhang & Chen, Fast Sampling of Diffusion Models with Exponential Integrator, arXiv 2204.13902; log-rho.

The noise prediction is extrapolated as a polynomial in log(rho), rho = sigma / alpha, and integrated exactly. Runs end
at the lowest noise level of the training schedule, not at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.schedulers.multistep import LambdaRun, MultistepSettings, Point, order_in_memory
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.rounding import exp
from runtimes.schedulers.settings import FLOW, FLOW_INERT, not_finite


@dataclass(frozen=True, kw_only=True)
class Deis(MultistepSettings):
    """DEIS with the keys and defaults of diffusers' DEISMultistepScheduler."""

    # dpmsolver and dpmsolver++ are read as deis, as diffusers does.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {**MultistepSettings.choices, "algorithm_type": ("deis", "dpmsolver", "dpmsolver++")}
    )
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = FLOW
    inert: ClassVar[frozenset[str]] = FLOW_INERT | {"use_dynamic_shifting"}
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr", "final_sigmas_type"})

    algorithm_type: str = "deis"
    solver_type: str = "logrho"

    def final_sigma(self, levels: Float64) -> float:
        """The lowest level of the run where levels are chosen by formula, else of the training schedule."""
        return float(levels[-1]) if self.spreads else float(self.training_sigmas[0])

    def _run(self, steps: int, first: int, eta: float) -> DeisRun:
        return DeisRun(self, steps, first)


class DeisRun(LambdaRun):
    """One run of DEIS."""

    def __init__(self, settings: Deis, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(settings, steps, first, memory=3)
        self._weights: list[list[np.float32]] = []
        count = len(self.timesteps)
        for i in range(count):
            order = order_in_memory(settings, i, count - i, self._total, ends_first=False)
            self._weights.append(_weights(self._points[i + 1 - order : i + 2]))
            if not np.all(np.isfinite(self._weights[i])):
                raise not_finite(count, i)

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """Eq. 14 of the paper in x / alpha, and DDIM at order 1."""
        self._in_order(i)
        here, after = self._points[i], self._points[i + 1]
        original = self._original(model_output, i, sample)
        self._remember(np.asarray((sample - here.alpha * original) / here.sigma))
        weights = self._weights[i]
        if len(weights) == 1:
            return after.alpha / here.alpha * sample - weights[0] * self._outputs[-1]
        moved: Float32 = np.asarray(sample / here.alpha)
        for weight, epsilon in zip(weights, self._outputs[::-1], strict=False):
            moved = moved + weight * epsilon
        return after.alpha * moved


def _weights(points: list[Point]) -> list[np.float32]:
    """Weights of the last outputs, newest first, for the step from the last but one of `points` to the last.

    numpy's own float32 logarithm, as diffusers takes it here.
    """
    *known, here, after = points
    if not known:
        return [after.sigma * (exp(after.lam - here.lam) - np.float32(1))]
    with np.errstate(all="ignore"):
        places = [np.log(np.float32(p.sigma / p.alpha)) for p in (here, *reversed(known))]
        ends = [np.float32(p.sigma / p.alpha) for p in (here, after)]
        primitive = _linear if len(places) == 2 else _quadratic
        turns = [places[k:] + places[:k] for k in range(len(places))]
        return [np.float32(primitive(ends[1], turn) - primitive(ends[0], turn)) for turn in turns]


def _linear(rho: np.float32, places: list[np.float32]) -> np.float32:
    """Antiderivative in rho of the polynomial in log(rho) that is 1 at the first place and 0 at the second."""
    b, c = places
    return np.float32(rho * (-c + np.log(rho) - np.float32(1)) / (b - c))


def _quadratic(rho: np.float32, places: list[np.float32]) -> np.float32:
    """Antiderivative in rho of the polynomial in log(rho) that is 1 at the first place and 0 at the other two."""
    b, c, d = places
    t, one, two = np.log(rho), np.float32(1), np.float32(2)
    return np.float32(rho * (c * (d - t + one) - d * t + d + t**2 - two * t + two) / ((b - c) * (b - d)))
