"""Runs any number of rows through a session: cast to its dtypes, split to the most it takes, padded to the fewest.

Every array has the shape and dtype that its TensorSpec says, but any number of rows, its first axis; what is fed is
cast.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.session import Arrays, Session
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import DTYPES, ShapeRange, TensorSpec
from runtimes.errors import BundleError, OutOfMemoryError

UNLIMITED = 1 << 30


class Described(Protocol):
    """A session, or what a manifest says of one."""

    @property
    def name(self) -> str:
        """Name of the component."""
        ...

    @property
    def component(self) -> Component:
        """Its record."""
        ...


class Listed(NamedTuple):
    """A component as a manifest lists it, without a session."""

    name: str
    component: Component


def input_spec(session: Described, name: str) -> TensorSpec:
    """The spec of one input.

    Raises:
        BundleError: the component has no such input.
    """
    for spec in session.component.inputs:
        if spec.name == name:
            return spec
    raise BundleError(f"has no input {name}, only {', '.join(s.name for s in session.component.inputs)}",
                      where=session.name, fix="build the bundle again")


def row_range(session: Session) -> ShapeRange:
    """How many rows one call takes, from the first axis of the first input."""
    rows = session.component.inputs[0].shape[0]
    if isinstance(rows, int):
        return ShapeRange(rows, rows, rows)
    axis = session.component.axes.get(rows)
    return axis.range if axis is not None else ShapeRange(1, 1, UNLIMITED)


def slices(count: int, most: int) -> list[slice]:
    """Consecutive slices over `count` rows, as equal as can be and none longer than `most`."""
    parts = -(-count // most)
    edges = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def all_finite(array: NDArray[Any]) -> bool:
    """Whether no element of an array, any values of any shape and dtype, is NaN or infinite.

    One pass without a temporary: a NaN or an infinity always reaches the sum. A sum may also overflow, so only a sum
    that is not finite asks element by element. Callers silence numpy's own warnings, once for many checks.
    """
    return math.isfinite(np.add.reduce(array, axis=None)) or bool(np.isfinite(array).all())


class RowRunner:
    """A session under a number of rows that stays the same from call to call: cut and padded as worked out once."""

    def __init__(self, session: Session, count: int) -> None:
        """Lay out the calls that `count` rows need; every input of the session has the batch as its first axis."""
        self._session, self._count = session, count
        self._dtypes = {s.name: DTYPES[s.dtype] for s in session.component.inputs}
        self._lay_out(row_range(session).max)

    def _lay_out(self, most: int) -> None:
        least, self._most = row_range(self._session).min, most
        self._parts = [(part, max(least - (part.stop - part.start), 0)) for part in slices(self._count, most)]
        self._whole = self._parts == [(slice(0, self._count), 0)]

    def cast(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """One input in the dtype that the session takes, for callers that feed it again and again."""
        return array.astype(self._dtypes[name], copy=False) if name in self._dtypes else array

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the rows and return every output, as many rows as were fed.

        Where memory runs out, the calls become smaller, for this and all later runs, down to the least rows that the
        session takes.

        Args:
            feeds: the component's inputs, cast to its dtypes; others are left out.

        Raises:
            OutOfMemoryError: not even those fit.
        """
        while True:
            try:
                return self._run(feeds)
            except OutOfMemoryError:
                rows = min(self._most, self._count)
                smaller = max(rows // 2, row_range(self._session).min)
                if smaller >= rows:
                    raise
                self._lay_out(smaller)

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        feeds = {name: feeds[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items() if name in feeds}
        if self._whole:
            return self._session.run(feeds)
        results = []
        for part, short in self._parts:
            outputs = self._session.run({name: _extended(array[part], short) for name, array in feeds.items()})
            results.append({name: array[: part.stop - part.start] for name, array in outputs.items()})
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def run_rows(session: Session, feeds: Arrays, output: str) -> NDArray[Any]:
    """Run any number of rows once and return one output; see `RowRunner`."""
    return RowRunner(session, len(next(iter(feeds.values())))).run(feeds)[output]


def _extended(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """`array` with its last row repeated `rows` times more."""
    return np.concatenate([array, np.repeat(array[-1:], rows, axis=0)]) if rows else array
