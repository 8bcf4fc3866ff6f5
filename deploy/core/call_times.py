"""Measures how long one call of a network takes; sessions take turns, so that other work slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.backends.session import Session
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import example_feeds

Feeds = dict[str, np.ndarray[Any, Any]]
SETTLE_SECONDS = 0.02  # the threads of the session before spin for a while after a call


def usual_feeds(component: Component) -> Feeds:
    """Inputs of the most common size that a component promises to take, with shape and dtype as its TensorSpecs say."""
    return example_feeds(component.inputs, {axis: a.range.opt for axis, a in component.axes.items()})


def seconds_in_turns(sessions: Mapping[str, Session], feeds: Feeds, calls: int, warm_up: int = 1,
                     ) -> dict[str, list[float]]:
    """Seconds of each call, by session: the n-th figures of two sessions were taken one after the other.

    Args:
        sessions: by name.
        feeds: of every call, with shape and dtype as the TensorSpecs say.
        calls: that count, of each. warm_up: calls of each before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(warm_up + calls):
        for name, session in sessions.items():
            time.sleep(SETTLE_SECONDS)
            began = time.perf_counter()
            session.run(feeds)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def quotient(seconds: Sequence[float], of: Sequence[float]) -> float:
    """The median quotient of figures that were taken in turns."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))
