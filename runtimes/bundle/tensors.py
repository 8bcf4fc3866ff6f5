"""Specs of a component's inputs and outputs: names, dtypes, symbolic shapes and the ranges of their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import InputError

DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, most common and largest size of a dynamic axis."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"a shape range needs 1 <= min <= opt <= max, got {self.min}:{self.opt}:{self.max}",
                fix="write it as min:opt:max, for example batch=1:2:8",
            )

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max


@dataclass(frozen=True)
class Axis:
    """A named dynamic axis.

    Attributes:
        meaning: what one step along it is ("images, doubled under guidance", "latent rows").
        range: sizes the component was built and checked for.
        multiple: sizes must be divisible by this (a U-Net that halves its input twice needs multiples of 4).
    """

    meaning: str
    range: ShapeRange
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InputError(f"sizes cannot be multiples of {self.multiple}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` mixes fixed sizes with names of axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}", where=self.name, fix=f"one of {', '.join(DTYPES)}")
        if any(isinstance(d, int) and d < 1 for d in self.shape):
            raise InputError(f"a size of {self.name} is below 1: {self.shape}")

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given sizes of the named axes."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)


def example_feeds(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs to measure with, with shape and dtype as the TensorSpecs say at given sizes of the axes.

    Floats are standard-normal noise of a fixed seed, integers ones.
    """
    rng = np.random.default_rng(0)

    def one(spec: TensorSpec) -> np.ndarray[Any, Any]:
        shape = spec.resolve(sizes)
        values = rng.standard_normal(shape) if spec.dtype.startswith("float") else np.ones(shape)
        return values.astype(DTYPES[spec.dtype])

    return {spec.name: one(spec) for spec in specs}


def bind_axes(
    specs: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray], axes: Mapping[str, Axis], where: str
) -> dict[str, int]:
    """Check feeds against TensorSpecs, each with its shape and dtype, and return the size of every named axis.

    Raises:
        InputError: a name, dtype, rank, fixed size, or range does not fit, or two inputs disagree on an axis.
    """
    missing = [s.name for s in specs if s.name not in feeds]
    unknown = sorted(set(feeds) - {s.name for s in specs})
    if missing or unknown:
        raise InputError(
            f"wrong inputs: missing {missing or 'none'}, unknown {unknown or 'none'}",
            where=where,
            fix=f"feed exactly {[s.name for s in specs]}",
        )
    sizes: dict[str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype != DTYPES[spec.dtype]:
            raise InputError(f"{spec.name} is {array.dtype}, expected {spec.dtype}", where=where)
        if array.ndim != len(spec.shape):
            raise InputError(f"{spec.name} has shape {array.shape}, expected {spec.shape}", where=where)
        for size, dimension in zip(array.shape, spec.shape, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise InputError(f"{spec.name} has shape {array.shape}, expected {spec.shape}", where=where)
            elif sizes.setdefault(dimension, size) != size:
                raise InputError(
                    f"{spec.name} has {dimension}={size}, another input has {sizes[dimension]}", where=where
                )
    for name, size in sizes.items():
        axis = axes.get(name)
        if axis is not None and (size not in axis.range or size % axis.multiple):
            of = f", multiples of {axis.multiple}" if axis.multiple > 1 else ""
            raise InputError(
                f"{name}={size} is outside what the bundle was built for ({axis.range.min} to {axis.range.max}{of})",
                where=where,
                fix="choose a size within it, or rebuild with --shapes (height and width in pixels, sequence in tokens)"
            )
    return sizes
