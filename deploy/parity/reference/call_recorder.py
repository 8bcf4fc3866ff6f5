"""A session that records the inputs of its calls, to take real inputs from a running pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.backends.session import Arrays, Session, WrappedSession


class Recorder(WrappedSession):
    """Passes calls through and keeps copies of what went in and came out.

    Attributes:
        calls: feeds of every call since the last `clear`, copied, in order.
        results: the outputs of those calls.
    """

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.calls: list[dict[str, np.ndarray[Any, Any]]] = []
        self.results: list[dict[str, np.ndarray[Any, Any]]] = []

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        # Copies: a sampler may reuse its buffers from step to step.
        self.calls.append({name: array.copy() for name, array in feeds.items()})
        outputs = super()._run(feeds)
        self.results.append({name: array.copy() for name, array in outputs.items()})
        return outputs

    def clear(self) -> None:
        """Forget the calls so far."""
        self.calls, self.results = [], []


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` calls, evenly spaced, always with the first and the last."""
    if count <= wanted or wanted < 2:
        return list(range(min(count, wanted)))
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)]
