"""Arithmetic and packing of weights as symmetric 4-bit integers with a scale for each group of inputs.

The layout of GPTQ and AWQ (arXiv 2210.17323, 2306.00978) without zero points.
`calibration.graphs.text_encoder_int4` places the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)

GROUP = 32  # inputs that share a scale: 4 bits and a float32 scale are 5 bits a weight
LOWEST, HIGHEST = -8, 7
# Of the range up to the largest magnitude that are tried. Four more of them change the error by less than 1 %.
RATIOS = (1.0, 0.9, 0.8, 0.7)
SMALLEST = 1e-10  # scale of a group of zeros
CHUNK_VALUES = 1 << 22  # weights that are worked on at a time, so that memory does not follow the network's size


def group_scales(weight: NDArray[np.float32], *, positive: bool = False) -> NDArray[np.float32]:
    """The scale of each group by least squares.

    Integers reach -8 but not 8: a scale of the sign that puts the value of largest magnitude at -8 has a step of 1/8
    of it, not of 1/7. For each ratio the values are rounded with that range, and the scale becomes <w, q> / <q, q>,
    which is the best one for these integers; of all ratios the least sum of squares wins.

    Args:
        weight: (outputs, inputs) float32; the last group of a row may be shorter.
        positive: never give a negative scale, for runtimes that refuse it.

    Returns:
        (outputs, groups) float32, none of them 0.
    """
    groups = -(-weight.shape[1] // GROUP)
    scales = np.empty((weight.shape[0], groups), np.float32)
    for rows in _chunks(weight):
        scales[rows] = _fit(grouped(np.asarray(weight[rows], np.float32)), positive)
    return scales


def to_int4(weight: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """The nearest integers of a weight (outputs, inputs) under its scales (outputs, groups): int8 in [-8, 7]."""
    integers = np.empty(weight.shape, np.int8)
    for rows in _chunks(weight):
        rounded = _rounded(grouped(np.asarray(weight[rows], np.float32)), scales[rows, :, None])
        integers[rows] = rounded.reshape(len(rounded), -1)[:, :weight.shape[1]]
    return integers


def from_int4(integers: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights that a runtime computes with, (outputs, inputs) float32.

    Args:
        integers: (outputs, inputs) int8, -8 to 7.
        scales: (outputs, groups) float32, as of `group_scales`.
    """
    values: NDArray[np.float32] = integers * np.repeat(scales, GROUP, axis=1)[:, :integers.shape[1]]
    return values


def pack_nbits(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """As `com.microsoft.MatMulNBits` reads them: q + 8, the first of two in the low bits, short groups padded with 8.

    Args:
        integers: (outputs, inputs) int8 weights, -8 to 7.

    Returns:
        (outputs, groups, GROUP / 2) uint8, two weights in each byte.
    """
    nibbles = (grouped(integers) - LOWEST).astype(np.uint8)
    return nibbles[..., ::2] | np.left_shift(nibbles[..., 1::2], np.uint8(4))


def grouped(weight: NDArray[T]) -> NDArray[T]:
    """Weights (outputs, inputs) -> (outputs, groups, GROUP) of the same dtype, the last group filled up with zeros."""
    short = -weight.shape[1] % GROUP
    padded = np.pad(weight, ((0, 0), (0, short))) if short else weight
    return padded.reshape(len(weight), -1, GROUP)


def _fit(groups: NDArray[np.float32], positive: bool) -> NDArray[np.float32]:
    """(N, G, GROUP) -> (N, G) scales."""
    where = np.abs(groups).argmax(axis=2)[..., None]
    largest = np.take_along_axis(groups, where, axis=2)
    full = np.abs(largest) / HIGHEST if positive else largest / LOWEST
    best = np.where(full == 0, SMALLEST, full).astype(np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    start = best
    for ratio in RATIOS:
        integers = _rounded(groups, start * np.float32(ratio))
        squares = (integers * integers).sum(axis=2, keepdims=True)
        scale = (integers * groups).sum(axis=2, keepdims=True) / np.maximum(squares, 1)
        scale = np.where(scale == 0, start, scale)
        error = ((_rounded(groups, scale) * scale - groups) ** 2).sum(axis=2, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best[..., 0]


def _rounded(groups: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = np.clip(np.rint(groups / scale), LOWEST, HIGHEST)
    return rounded


def _chunks(weight: NDArray[np.float32]) -> Iterator[slice]:
    rows = max(CHUNK_VALUES // max(weight.shape[1], 1), 1)
    return (slice(start, start + rows) for start in range(0, len(weight), rows))
