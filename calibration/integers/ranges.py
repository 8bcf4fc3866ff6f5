"""Chooses from observed values the range that an 8-bit integer covers: four estimators, integer types, drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import InputError

BINS = 2048
STRATA = 10  # equal parts of the training schedule, by timestep
SCHEDULE = 1000.0
PERCENTILE = 99.99
Array = NDArray[np.float64]


@dataclass
class Observed:
    """Statistics of one activation tensor over all calls.

    Attributes:
        low, high: smallest and largest value.
        by_stratum: stratum of the timestep -> (low, high).
        counts: (BINS,) float64 histogram over [low, high]; empty until the second pass.
    """

    low: float = np.inf
    high: float = -np.inf
    by_stratum: dict[int, tuple[float, float]] = field(default_factory=dict)
    counts: Array = field(default_factory=lambda: np.zeros(0))

    def extend(self, values: NDArray[Any], stratum: int | None) -> None:
        """First pass: widen the range by activations of any shape and dtype, of a stratum of the schedule if known."""
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if stratum is not None:
            before = self.by_stratum.get(stratum, (np.inf, -np.inf))
            self.by_stratum[stratum] = min(before[0], low), max(before[1], high)

    def count(self, values: NDArray[Any]) -> None:
        """Second pass: add activations of any shape and dtype to the histogram."""
        if not self.counts.size:
            self.counts = np.zeros(BINS)
        if self.high > self.low:
            scaled = (values.ravel() - self.low) * (BINS / (self.high - self.low))
            self.counts += np.bincount(np.clip(scaled.astype(np.int64), 0, BINS - 1), minlength=BINS)

    @property
    def centres(self) -> Array:
        """(BINS,) float64 activation in the middle of each bin."""
        width = (self.high - self.low) / BINS
        middle: Array = self.low + width * (np.arange(BINS, dtype=np.float64) + 0.5)
        return middle


@dataclass(frozen=True)
class Scheme:
    """The integers of activations, which follow from the runtime.

    ONNX Runtime and OpenVINO multiply unsigned activations with signed weights (U8S8: VPDPBUSD takes exactly these).
    TensorRT knows signed integers with zero point 0 only.

    Attributes:
        signed: int8 with zero point 0 instead of uint8 with any.
        weight_limit: largest weight integer; 63 leaves room in the 16-bit sums of x86 CPUs without VNNI.
        quantize_outputs: also quantize what convolutions give. ONNX Runtime has integer kernels for nothing else.
        give_biases: give each quantized convolution a bias that is not 0 everywhere. OpenVINO 2026.4 multiplies by the
            scales twice where such a convolution has none and two readers, one of them a sum (docs/openvino.md).
    """

    signed: bool = False
    weight_limit: int = 127
    quantize_outputs: bool = False
    give_biases: bool = False

    def scale_and_zero(self, low: float, high: float) -> tuple[np.float32, int]:
        """Scale and zero point of a range; 0 is always exactly representable, as zero padding needs."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self.signed:
            return np.float32(max(-low, high, 1e-8) / 127), 0
        scale = max((high - low) / 255, 1e-8)
        return np.float32(scale), int(np.clip(round(-low / scale), 0, 255))

    def rounded(self, values: Array, low: Array, high: Array) -> Array:
        """Activations rounded to the integers of each of R ranges and back.

        Args:
            values: (N,) float64 activations.
            low, high: (R,) float64, ends of the ranges.

        Returns:
            (R, N) float64.
        """
        low, high = np.minimum(low, 0.0)[:, None], np.maximum(high, 0.0)[:, None]
        if self.signed:
            scale = np.maximum(np.maximum(-low, high), 1e-8) / 127
            return np.clip(np.round(values / scale), -127, 127) * scale
        scale = np.maximum((high - low) / 255, 1e-8)
        zero = np.round(-low / scale)
        return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


Range = tuple[float, float]


def minmax(seen: Observed, scheme: Scheme) -> Range:
    """The range of everything that was observed."""
    return seen.low, seen.high


def percentile(seen: Observed, scheme: Scheme) -> Range:
    """The range of all but the outermost 0.01 % at each end."""
    cumulated = np.cumsum(seen.counts) / max(seen.counts.sum(), 1)
    tail = 1 - PERCENTILE / 100
    first, last = np.searchsorted(cumulated, [tail, 1 - tail])
    return float(seen.centres[first]), float(seen.centres[min(last, BINS - 1)])


def mse(seen: Observed, scheme: Scheme) -> Range:
    """The range whose rounding and clipping errors have the least sum of squares; each end is searched in turn."""
    shrink = np.linspace(0.2, 1.0, 65)
    low, high = np.full(shrink.size, seen.low), seen.high * shrink
    if scheme.signed:
        low = seen.low * shrink
    for end in ("high", "low") if not scheme.signed else ("both",):
        rounded = scheme.rounded(seen.centres, low, high)
        best = int(np.argmin(((rounded - seen.centres) ** 2 * seen.counts).sum(axis=1)))
        found = float(low[best]), float(high[best])
        if end == "high":
            low, high = seen.low * shrink, np.full(shrink.size, found[1])
    return found


def entropy(seen: Observed, scheme: Scheme) -> Range:
    """The range of least Kullback-Leibler divergence between the clipped and the quantized histogram of magnitudes.

    Migacz, "8-bit inference with TensorRT", GTC 2017. An end that lies nearer to zero than the threshold stays.
    """
    magnitude = max(-seen.low, seen.high, 1e-8)
    folded: Array = np.bincount(np.minimum((np.abs(seen.centres) / magnitude * BINS).astype(np.int64), BINS - 1),
                         weights=seen.counts, minlength=BINS).astype(np.float64)
    levels = 128
    candidates = range(levels, BINS + 1, 32)
    best = min(candidates, key=lambda bins: _divergence(folded, bins, levels))
    threshold = magnitude * best / BINS
    return max(seen.low, -threshold), min(seen.high, threshold)


def _divergence(counts: Array, bins: int, levels: int) -> float:
    clipped = counts[:bins].copy()
    clipped[-1] += counts[bins:].sum()
    of = np.arange(bins) * levels // bins
    occupied = counts[:bins] > 0
    sums = np.bincount(of, weights=counts[:bins], minlength=levels)
    present = np.bincount(of, weights=occupied, minlength=levels)
    spread = np.where(occupied, (sums / np.maximum(present, 1))[of], 0.0)
    if not clipped.sum() or not spread.sum():
        return np.inf
    p, q = clipped / clipped.sum(), spread / spread.sum()
    both = (p > 0) & (q > 0)
    lost = p[(p > 0) & ~both].sum()
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(1e9))


ESTIMATORS: dict[str, Callable[[Observed, Scheme], Range]] = {
    "minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy,
}


def estimate(seen: Mapping[str, Observed], estimator: str, scheme: Scheme) -> dict[str, Range]:
    """The range of every tensor.

    Raises:
        InputError: no such estimator, or a tensor whose values are not finite.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown range estimator {estimator!r}", where="range estimator",
                         fix=f"one of {', '.join(ESTIMATORS)}")
    for name, observed in seen.items():
        if not np.isfinite([observed.low, observed.high]).all():
            raise InputError("its values are not finite on the calibration data", where=name,
                             fix="keep this layer in float32")
    return {name: ESTIMATORS[estimator](observed, scheme) for name, observed in seen.items()}


def stratum_of(timestep: float) -> int:
    """Which of `STRATA` equal parts of the schedule a timestep is in, 0 being the least noise."""
    return int(min(max(timestep / SCHEDULE * STRATA, 0), STRATA - 1))


def drift(seen: Mapping[str, Observed]) -> dict[str, list[list[float]]]:
    """Tensor -> one [stratum, low, high] for each stratum it was seen in: how ranges move over the schedule."""
    return {name: [[s, float(f"{low:.3g}"), float(f"{high:.3g}")] for s, (low, high) in sorted(o.by_stratum.items())]
            for name, o in seen.items() if o.by_stratum}
