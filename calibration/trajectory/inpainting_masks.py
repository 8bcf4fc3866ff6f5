"""Inpainting masks like those that people paint, of any share of an image. `prompts` plans which of them are used.

Free-form strokes, rectangles and outpainting are what inpainting is trained and measured under (Yu et al., arXiv
1806.03589; Suvorov et al., LaMa, arXiv 2109.07161; Lugmayr et al., RePaint, arXiv 2201.09865, for half images).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Float64 = NDArray[np.float64]
PaintOne = Callable[[np.random.Generator, int, int, float, int], Bools]
_BENDS = 5  # of a stroke
_LONG = 0.35  # a stroke's segment, relative to the side of a square of the painted area
_MOST_STRETCHED = 2.0  # a rectangle's sides, relative to those of the image's shape


def paint_mask(kind: str, height: int, width: int, painted: float, seed: int, grain: int = 1) -> NDArray[np.uint8]:
    """A mask of one kind.

    Args:
        kind: one of KINDS.
        height, width: pixels.
        painted: share of the image that is painted anew, above 0; at 1, all of it whatever the kind.
        seed: of the mask's place and shape; equal seeds give equal masks.
        grain: pixels per latent. What is painted is never so small that it would miss every latent, nor is what stays,
            unless a brush left it.

    Returns:
        (height, width) uint8, 255 where the image is painted anew and 0 where it stays.
    """
    if painted >= 1:
        return np.full((height, width), 255, np.uint8)
    mask = KINDS[kind](np.random.default_rng(seed), height, width, painted, grain)
    return np.where(mask, np.uint8(255), np.uint8(0))


def _rectangle(random: np.random.Generator, height: int, width: int, painted: float, grain: int) -> Bools:
    """A rectangle inside the image."""
    stretch = _MOST_STRETCHED ** random.uniform(-1, 1)
    tall = float(np.clip(np.sqrt(painted) * stretch, painted, 1))
    rows, columns = max(round(tall * height), grain), max(round(painted / tall * width), grain)
    if rows > height - 2 * grain and columns > width - 2 * grain:  # else what is around it could miss every latent
        columns = max(width - 2 * grain, grain)
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    mask = np.zeros((height, width), np.bool_)
    mask[top:top + rows, left:left + columns] = True
    return mask


def _outpainting(random: np.random.Generator, height: int, width: int, painted: float, grain: int) -> Bools:
    """An image continued beyond its borders: all but a rectangle."""
    return ~_rectangle(random, height, width, 1 - painted, grain)


def _half_plane(random: np.random.Generator, height: int, width: int, painted: float, grain: int) -> Bools:
    """One side of a straight line in any direction."""
    thin = grain / min(height, width)
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = _grid(height, width)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    return np.asarray(along <= np.quantile(along, np.clip(painted, thin, 1 - thin)))


def _strokes(random: np.random.Generator, height: int, width: int, painted: float, grain: int) -> Bools:
    """A brush painted along a crooked line, as wide as the share asks for."""
    reach, ends = _LONG * np.sqrt(painted * height * width), np.array([height, width], np.float64) - grain
    place, angle = random.uniform(0, ends), random.uniform(0, 2 * np.pi)
    line = [place]
    for _ in range(_BENDS):
        angle += random.uniform(-np.pi / 2, np.pi / 2)
        place = np.clip(place + reach * np.array([np.sin(angle), np.cos(angle)]), 0, ends)
        line.append(place)
    rows, columns = _grid(height, width)
    away = np.min([_distance(rows, columns, a, b) for a, b in pairwise(line)], axis=0)
    # A disc of this radius holds a latent's pixel wherever it lies.
    return np.asarray(away <= max(float(np.quantile(away, painted)), grain / np.sqrt(2)))


def _grid(height: int, width: int) -> tuple[Float64, Float64]:
    """Row and column of each pixel, (height, 1) and (1, width)."""
    return np.arange(height, dtype=np.float64)[:, None], np.arange(width, dtype=np.float64)[None, :]


def _distance(rows: Float64, columns: Float64, a: Float64, b: Float64) -> Float64:
    """Distance of each pixel to the segment from a to b."""
    step = b - a
    along = ((rows - a[0]) * step[0] + (columns - a[1]) * step[1]) / max(float(step @ step), 1e-12)
    nearest = np.clip(along, 0, 1)
    distance: Float64 = np.hypot(rows - a[0] - nearest * step[0], columns - a[1] - nearest * step[1])
    return distance


KINDS: dict[str, PaintOne] = {
    "rectangle": _rectangle, "strokes": _strokes, "half-plane": _half_plane, "outpainting": _outpainting}
