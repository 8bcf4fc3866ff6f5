"""Rows through a session: cast to what it takes, cut to the batch it was built for, padded where it asks for more."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import BundleError
from runtimes.session import Arrays, Session
from runtimes.tensors import DTYPES, ShapeRange, TensorSpec

UNLIMITED = 1 << 30


def input_spec(session: Session, name: str) -> TensorSpec:
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


def run_rows(session: Session, feeds: Arrays, output: str) -> NDArray[Any]:
    """Run any number of rows and return one output.

    Args:
        session: a component whose every input has the batch as its first axis.
        feeds: its inputs, equally many rows each; cast to the component's dtypes.
        output: name of the output.

    Returns:
        as many rows as were fed.
    """
    feeds = {s.name: feeds[s.name].astype(DTYPES[s.dtype], copy=False)
             for s in session.component.inputs if s.name in feeds}
    count = len(next(iter(feeds.values())))
    limits = row_range(session)
    if limits.min <= count <= limits.max:
        return session.run(feeds)[output]
    results = []
    for part in slices(count, limits.max):
        rows = part.stop - part.start
        short = max(limits.min - rows, 0)
        piece = {name: _extended(array[part], short) for name, array in feeds.items()}
        results.append(session.run(piece)[output][:rows])
    return np.concatenate(results)


def _extended(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """`array` with its last row repeated `rows` times more."""
    return np.concatenate([array, np.repeat(array[-1:], rows, axis=0)]) if rows else array
