"""Predicts how much memory a bundle's calls take, from measurements, and how many images fit into a budget.

    peak = base + sum over denoiser and decoder of (c + b * rows * area + q * rows * area^2)

rows of one call, area in latents; q is what attention costs where a backend holds its matrices. `memory_measurement`
measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import InputError

MEASURED = DENOISER, DECODER = ("denoiser", "decoder")
NOISE_BYTES = 1_000_000
MARGIN = 1.1  # of what is generated with, above what is loaded: the least error seen in repeated runs is a few percent
IMAGE_BYTES = 2 * 3 * 4  # for each pixel: float32 RGB, once more while it is converted


@dataclass(frozen=True)
class MemoryModel:
    """Peak resident memory of a process that generates.

    Attributes:
        base_bytes: with everything loaded and nothing generated.
        costs: "denoiser" and "decoder" -> c, b and q of the formula above, in bytes.
    """

    base_bytes: float
    costs: Mapping[str, Sequence[float]]

    def peak_bytes(self, calls: Sequence[Mapping[str, int]], area: int) -> float:
        """What calls of so many rows of denoiser and decoder, at so many latents a row, take together."""
        return self.base_bytes + MARGIN * sum(
            max(float(np.dot(self.costs[name], _features(count, area))), 0.0)
            for rows in calls for name, count in rows.items())


@dataclass(frozen=True)
class MemoryBudget:
    """How many images share a call, so that the process stays below so many bytes."""

    bytes: int
    model: MemoryModel

    def images_at_once(self, count: int, copies: int, area: int, pixels: int) -> int:
        """The most of `count` images that fit.

        Args:
            count: images of the request.
            copies: denoiser rows for each, 2 under guidance.
            area: latents of one row.
            pixels: of all images together.

        Raises:
            InputError: not even one fits.
        """
        for images in range(count, 0, -1):
            parts = -(-count // images)
            # A backend keeps memory for every shape it has met, and calls may differ by one image.
            needed = IMAGE_BYTES * pixels + self.model.peak_bytes(
                [{DENOISER: copies * n, DECODER: n} for n in {count // parts, -(-count // parts)}], area)
            if needed <= self.bytes:
                return images
        raise InputError(f"one image at a time needs about {needed / 1e6:.0f} MB, the budget is "
                         f"{self.bytes / 1e6:.0f} MB", where="memory budget",
                         fix="generate in smaller tiles, a smaller image, or raise the budget")


def fit(measured: Mapping[str, Any]) -> MemoryModel:
    """Least squares for denoiser and decoder; more rows or latents never cost less.

    Args:
        measured: `base` in bytes, and of denoiser and decoder a list of [rows, area, growth in bytes].
    """
    costs = {}
    for name in MEASURED:
        points = np.array(measured[name], np.float64)
        # The smallest calls fit into what loading has freed: they say nothing of what more costs.
        telling = points[points[:, 2] > points[0, 2] + NOISE_BYTES] if len(points) > 1 else points
        telling = telling if len(telling) > 1 else points[-2:]
        costs[name] = _fitted(np.array([_features(rows, area) for rows, area, _ in telling]), telling[:, 2])
    return MemoryModel(measured["base"], costs)


def _features(rows: float, area: float) -> tuple[float, float, float]:
    return 1.0, rows * area, rows * area * area


def _fitted(features: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> list[float]:
    """c, b and q: the best fit whose b and q are not below zero, by both of them, by either, or by c alone."""
    scale = features.max(axis=0)
    best, least = [float(wanted.max()), 0.0, 0.0], float(np.sum((wanted - wanted.max()) ** 2))
    for columns in ((0, 1), (0, 2), (0, 1, 2)):
        chosen = (features / scale)[:, columns]
        found = np.linalg.lstsq(chosen, wanted, rcond=None)[0]
        error = float(np.sum((chosen @ found - wanted) ** 2))
        # q is for growth that a straight line does not explain: its guesses reach far beyond what was measured.
        if len(columns) <= len(wanted) and (found[1:] >= 0).all() and error < least * (0.5 if 2 in columns else 1):
            least, best = error, [0.0, 0.0, 0.0]
            for column, value in zip(columns, found, strict=True):
                best[column] = float(value / scale[column])
    return best
