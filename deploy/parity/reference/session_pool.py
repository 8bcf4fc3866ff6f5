"""Opens sessions when they are first run and frees them again, so that few networks are in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtimes.backends.session import Arrays, Session
from runtimes.bundle.manifest import Component


class PooledSession(Session):
    """A session that its pool opens when it is run, and may free between two calls."""

    def __init__(self, name: str, component: Component, pool: SessionPool) -> None:
        super().__init__(name, component)
        self._pool = pool

    def _run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        return self._pool.opened(self.name).run(feeds)

    def _close(self) -> None:
        self._pool.free(self.name)


class SessionPool:
    """Opens the sessions of a bundle on demand and keeps at most `capacity` of them. For one thread at a time.

    Args:
        components: what the sessions are of.
        opener: loads one by name; what it raises reaches the caller of `run`.
        capacity: how many stay loaded; the least recently run is freed before another is opened.
    """

    def __init__(
        self, components: Mapping[str, Component], opener: Callable[[str], Session], capacity: int = 1
    ) -> None:
        self._opener, self._capacity = opener, capacity
        self._open: dict[str, Session] = {}
        self.sessions: dict[str, Session] = {
            name: PooledSession(name, component, self) for name, component in components.items()
        }

    def opened(self, name: str) -> Session:
        """The loaded session of that name, after freeing what has to make room for it."""
        session = self._open.pop(name, None)
        if session is None:
            while len(self._open) >= self._capacity:
                self.free(next(iter(self._open)))
            session = self._opener(name)
        self._open[name] = session  # dicts keep insertion order: the first is the least recently run
        return session

    def free(self, name: str) -> None:
        """Close one session if it is loaded."""
        session = self._open.pop(name, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Close all that are loaded; a later run opens them again."""
        for name in list(self._open):
            self.free(name)
