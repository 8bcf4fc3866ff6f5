"""Quantiles of the symmetric beta distribution, as `scipy.stats.beta.ppf(p, a, a)` gives them, without SciPy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

TERMS, HALVINGS = 80, 64  # the series shrinks by more than 1/2 a term, the interval by 1/2 a halving


def beta_quantile(p: Float64, a: float) -> Float64:
    """The quantiles x, 0 to 1, with I_x(a, a) = p, for probabilities p in [0, 1] and a > 0: same shape, float64.

    The lower half is found by bisection in u = x^a, where the incomplete beta function is nearly linear; the upper half
    is its mirror image.
    """
    lower = np.minimum(p, 1 - p)
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5**a)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = _incomplete(middle ** (1 / a), a) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = np.where(lower <= 0, 0.0, ((low + high) / 2) ** (1 / a))
    return np.where(p <= 0.5, x, 1 - x)


def _incomplete(x: Float64, a: float) -> Float64:
    """I_x(a, a) for x in [0, 1/2], by its power series: Abramowitz & Stegun, 26.5.4 with 6.6.8."""
    term, total = np.ones_like(x), np.full_like(x, 1 / a)
    for n in range(1, TERMS):
        term = term * x * (n - a) / n
        total = total + term / (a + n)
    return np.asarray(x**a * total * math.gamma(2 * a) / math.gamma(a) ** 2)
