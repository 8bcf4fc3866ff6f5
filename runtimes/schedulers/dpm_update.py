"""Computes one step of DPM-Solver in its four forms: its coefficients, and the combination of model outputs.

Lu et al., DPM-Solver, arXiv 2206.00927 (`dpmsolver`, in noise prediction), and DPM-Solver++, arXiv 2211.01095
(`dpmsolver++`, in data prediction; section 4 for `sde-`). All have the form

    x_t = sample * x_s + outputs[0] * D0 + outputs[1] * D1 + outputs[2] * D2 + noise * z

with D0 a converted model output and D1, D2 its finite differences in lambda.

Every array here is (B, C, H, W) float32: samples, converted model outputs, standard-normal noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runtimes.schedulers.multistep import Point
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.rounding import exp, root
from runtimes.schedulers.sampler_run import required

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)


@dataclass(frozen=True)
class Update:
    """The coefficients of a step of order `len(outputs)`; see the module."""

    sample: np.float32
    outputs: tuple[np.float32, ...]
    noise: np.float32
    # Lengths of the steps between the outputs used, in units of this step's.
    ratios: tuple[np.float32, ...] = ()

    def usable(self, stands: bool) -> bool:
        """Whether all coefficients are finite and no ratio is 0.

        A step of no length (`stands`) changes nothing, so its coefficients may be NaN; its ratios may not.
        """
        if stands:
            return not np.any(np.isnan(self.ratios))
        numbers = [self.sample, *self.outputs, self.noise, *self.ratios]
        return bool(np.all(np.isfinite(numbers))) and all(ratio != 0 for ratio in self.ratios)

    def __call__(self, sample: Float32, differences: Sequence[Float32], noise: Float32 | None) -> Float32:
        """x_t; `noise` is needed where its coefficient is not 0."""
        result: Float32 = self.sample * sample
        for weight, difference in zip(self.outputs, differences, strict=True):
            result = result + weight * difference
        return result + self.noise * required(noise) if self.noise else result


def update(algorithm: str, heun: bool, order: int, s: Point, t: Point, ratios: tuple[np.float32, ...]) -> Update:
    """The step from `s` to `t`, in float32 and diffusers' order: see `rounding`.

    Args:
        algorithm: one of `ALGORITHMS`.
        heun: the second-order term as the Taylor expansion has it, not as the paper's midpoint.
        order: 1 to 3.
        s: where the sample is.
        t: where it goes.
        ratios: see `Update.ratios`.
    """
    with np.errstate(all="ignore"):  # h is infinite where t has no noise, 0 where levels repeat
        h = t.lam - s.lam
        if algorithm == "dpmsolver++":
            fall = exp(-h) - ONE
            sample, noise = t.sigma / s.sigma, np.float32(0)
            first, middle = -(t.alpha * fall), -(HALF * (t.alpha * fall))
            taylor = t.alpha * (fall / h + ONE), -(t.alpha * ((fall + h) / h**2 - HALF))
        elif algorithm == "dpmsolver":
            rise = exp(h) - ONE
            sample, noise = t.alpha / s.alpha, np.float32(0)
            first, middle = -(t.sigma * rise), -(HALF * (t.sigma * rise))
            taylor = -(t.sigma * (rise / h - ONE)), -(t.sigma * ((rise - h) / h**2 - HALF))
        elif algorithm == "sde-dpmsolver++":
            fall = ONE - exp(-TWO * h)
            sample, noise = t.sigma / s.sigma * exp(-h), t.sigma * root(fall)
            first, middle = t.alpha * fall, HALF * (t.alpha * fall)
            # The last one tends to -1 with h, not to 0: the sign of diffusers' third-order SDE step is wrong.
            taylor = t.alpha * (fall / (-TWO * h) + ONE), t.alpha * ((fall - TWO * h) / (TWO * h) ** 2 - HALF)
        else:
            rise = exp(h) - ONE
            sample, noise = t.alpha / s.alpha, t.sigma * root(exp(TWO * h) - ONE)
            first, middle = -(TWO * (t.sigma * rise)), -(t.sigma * rise)
            taylor = -(TWO * (t.sigma * (rise / h - ONE))), np.float32(np.nan)
        second = taylor[0] if heun or order == 3 else middle
    return Update(sample, (first, second, taylor[1])[:order], noise, ratios)


def multistep_update(algorithm: str, heun: bool, order: int, points: Sequence[Point]) -> Update:
    """The step from the last but one of `points` to the last; earlier outputs were at the others, newest last."""
    *before, s, t = points
    with np.errstate(all="ignore"):
        h = t.lam - s.lam
        places = [*before, s][-order:]
        ratios = [(later.lam - earlier.lam) / h for earlier, later in pairwise(places)]
    return update(algorithm, heun, order, s, t, tuple(reversed(ratios)))


def differences(outputs: Sequence[Float32], ratios: Sequence[np.float32]) -> list[Float32]:
    """D0, D1, D2: one more than there are `ratios`; `outputs` are newest last."""
    newest = outputs[::-1]
    if not ratios:
        return [newest[0]]
    near: Float32 = (ONE / ratios[0]) * (newest[0] - newest[1])
    if len(ratios) == 1:
        return [newest[0], near]
    far: Float32 = (ONE / ratios[1]) * (newest[1] - newest[2])
    both = ratios[0] + ratios[1]
    return [newest[0], near + (ratios[0] / both) * (near - far), (ONE / both) * (near - far)]
