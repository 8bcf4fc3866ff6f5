"""Finds the size nearest to an aspect ratio that a bundle makes, at about the number of pixels it was trained with."""

from __future__ import annotations

import numpy as np

from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError

BUCKETS = ("1:1", "5:4", "4:3", "3:2", "16:9", "21:9", "4:5", "3:4", "2:3", "9:16", "9:21")
Side = tuple[ShapeRange, int]


def parse_aspect(text: str) -> float:
    """Width over height of `16:9` or `1.78`.

    Raises:
        InputError: not two positive numbers, or beyond 100.
    """
    width, colon, height = text.partition(":")
    try:
        ratio = float(width) / float(height if colon else 1)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0.01 <= ratio <= 100:
        raise InputError(f"{text!r} is not an aspect ratio", where="aspect", fix="write width:height, as 16:9")
    return ratio


def nearest_size(aspect: float, pixels: int, height: Side, width: Side) -> tuple[int, int]:
    """Height and width in pixels nearest to a shape: the ratio counts twice as much as the number of pixels.

    Both are compared as logarithms, so that an image twice as wide is as far off as one half as wide.

    Args:
        aspect: width over height.
        pixels: that the model was trained with.
        height, width: what the bundle takes: a range, and the number that sizes are multiples of.
    """
    rows, columns = (np.arange(span.min, span.max + 1, multiple) for span, multiple in (height, width))
    shape = np.abs(np.log(columns[None] / (aspect * rows[:, None])))
    area = np.abs(np.log(rows[:, None] * columns[None] / pixels))
    best = np.unravel_index(np.argmin(2 * shape + area), shape.shape)
    return int(rows[best[0]]), int(columns[best[1]])
