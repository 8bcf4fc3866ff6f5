"""Fits real inputs, recorded from runs of the reference pipeline, to each planned shape by cutting or repeating them.

Every array has the shape and dtype that the component's TensorSpec says at the planned sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.parity.reference.call_recorder import spread
from runtimes.bundle.manifest import Component
from runtimes.errors import InputError

Feeds = dict[str, np.ndarray[Any, Any]]
CALLS_PER_SHAPE = 3  # first, middle and last step: high noise, both, low noise


class NoRealInputsError(InputError):
    """The reference pipeline never runs a component."""


@dataclass(frozen=True)
class Sample:
    """One call of a component with what the reference answered.

    Attributes:
        feeds: inputs by name, in the component's dtypes.
        outputs: the reference's outputs by name.
    """

    feeds: Feeds
    outputs: Feeds

    def shape_of(self, component: Component) -> tuple[int, ...]:
        """Shape of the component's first input: what a report calls the shape of the sample."""
        return tuple(self.feeds[component.inputs[0].name].shape)


def fit(component: Component, calls: Sequence[Feeds], sizes: Mapping[str, int]) -> list[Feeds]:
    """Turn recorded calls into at most `CALLS_PER_SHAPE` calls of exactly the planned sizes.

    A batch is filled from rows spread over the call, so that both guidance branches are in it; a call with too few
    rows borrows the other calls' and then repeats its own. A sequence is cut to its first tokens or repeated.

    Args:
        component: whose inputs they are.
        calls: recorded feeds, all with the planned height and width.
        sizes: of the named axes.

    Raises:
        NoRealInputsError: nothing was recorded.
        InputError: an image of another size was recorded.
    """
    if not calls:
        raise NoRealInputsError("text to image never calls it, so there are no real inputs to compare at")
    return [_fit_call(component, calls, i, sizes) for i in spread(len(calls), CALLS_PER_SHAPE)]


def _fit_call(component: Component, calls: Sequence[Feeds], index: int, sizes: Mapping[str, int]) -> Feeds:
    first = component.inputs[0]
    batch_axis = first.shape[0]
    batch = sizes[batch_axis] if isinstance(batch_axis, str) else batch_axis
    rows = len(calls[index][first.name])
    pooled = [calls[index], *(c for i, c in enumerate(calls) if i != index)] if rows < batch else [calls[index]]
    total = sum(len(c[first.name]) for c in pooled)
    chosen = spread(total, batch) if rows >= batch else [i % total for i in range(batch)]
    feeds: Feeds = {}
    for spec in component.inputs:
        array = calls[index][spec.name]
        if spec.shape and spec.shape[0] == batch_axis:
            array = np.concatenate([c[spec.name] for c in pooled])[chosen]
        for dimension, name in enumerate(spec.shape[1:], start=1):
            wanted = sizes[name] if isinstance(name, str) else name
            if array.shape[dimension] == wanted:
                continue
            if len(spec.shape) == 4:
                raise InputError(f"{spec.name} was recorded as {array.shape}, {name}={wanted} was planned",
                                 where=component.file)
            array = array.take(np.arange(wanted) % array.shape[dimension], axis=dimension)
        feeds[spec.name] = np.ascontiguousarray(array)
    return feeds


def cast(feeds: Feeds, component: Component) -> Feeds:
    """Feeds in the dtypes that a component's inputs have; a renamed input stays as it is and is refused by the run."""
    dtypes = {spec.name: spec.dtype for spec in component.inputs}
    return {name: array.astype(dtypes.get(name, array.dtype), copy=False) for name, array in feeds.items()}


def pack(feeds: Sequence[Feeds], kind: str) -> Feeds:
    """Several calls as one flat mapping, `<index>/<kind>/<name>`, for `Store`."""
    return {f"{i}/{kind}/{name}": array for i, call in enumerate(feeds) for name, array in call.items()}


def unpack(flat: Mapping[str, np.ndarray[Any, Any]], kind: str) -> list[Feeds]:
    """The calls that `pack` made flat."""
    calls: dict[int, Feeds] = {}
    for key, array in flat.items():
        index, found, name = key.split("/", 2)
        if found == kind:
            calls.setdefault(int(index), {})[name] = array
    return [calls[i] for i in sorted(calls)]
