"""Elementary functions of float32 scalars, each computed in float64 and rounded once.

The coefficients of a step are differences of nearly equal logarithms and exponentials. What is left of them in float32
depends on every rounding, so that equality with diffusers needs its precision and its order. numpy's own float32
functions may be off by several units in the last place, and by others than torch's.
"""

from __future__ import annotations

import numpy as np

Number = np.float32 | float


def root(value: Number) -> np.float32:
    """Square root."""
    return np.float32(np.sqrt(np.float64(np.float32(value))))


def log(value: Number) -> np.float32:
    """Natural logarithm, -inf at 0."""
    with np.errstate(divide="ignore"):
        return np.float32(np.log(np.float64(np.float32(value))))


def exp(value: Number) -> np.float32:
    """Exponential, inf where it overflows."""
    with np.errstate(over="ignore"):
        return np.float32(np.exp(np.float64(np.float32(value))))


def expm1(value: Number) -> np.float32:
    """exp(value) - 1, exact near 0."""
    with np.errstate(over="ignore"):
        return np.float32(np.expm1(np.float64(np.float32(value))))
