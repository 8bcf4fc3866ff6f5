"""Random numbers: one stream per image, so that an image is the same alone or within a batch. No global state."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import InputError


class NoiseStreams:
    """A stream of standard-normal numbers for every image of a call."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next numbers of every stream: (images, *shape) float32, unit variance."""
        result = np.empty((len(self._generators), *shape), np.float32)
        for row, generator in zip(result, self._generators, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return result


def resolve_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One seed per image.

    Args:
        seed: one per image; or that of the first image, the others counting on from it; or None for unpredictable ones.
        count: number of images.

    Raises:
        InputError: not whole numbers from 0 on, or another number of them than images.
    """
    if seed is None:
        first = secrets.randbits(32)
        return tuple(first + i for i in range(count))
    if (isinstance(seed, Sequence) and not isinstance(seed, str)) or (isinstance(seed, np.ndarray) and seed.ndim):
        seeds = tuple(_whole(s) for s in seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} images", where="seed", fix="give one per image, or one")
        return seeds
    first = _whole(seed)
    return tuple(first + i for i in range(count))


def _whole(seed: object) -> int:
    try:
        if isinstance(seed, bool | np.bool_):
            raise TypeError
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if value < 0:
        raise InputError(f"the seed {seed!r} is not a whole number from 0 on", where="seed")
    return value
