"""How library code says what it is doing: one protocol, and who listens. Nothing of ours but a command line prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Receives what a long command does, as text for a person."""

    def working(self, text: str) -> None:
        """Something starts; what it is."""

    def advanced(self, done: int, total: int, unit: str) -> None:
        """So much is done of what was started last.

        Args:
            done, total: how many there are and will be.
            unit: of what, in the plural; a figure may follow it: "steps, loss 0.1".
        """

    def finished(self, text: str) -> None:
        """Something is done, or a milestone of it is reached; stays to be read."""


class Silent:
    """A listener for library use."""

    def working(self, text: str) -> None:
        """Nothing."""

    def advanced(self, done: int, total: int, unit: str) -> None:
        """Nothing."""

    def finished(self, text: str) -> None:
        """Nothing."""


_LISTENER: ContextVar[Listener] = ContextVar("listener")
_SILENT = Silent()


def listener() -> Listener:
    """Who listens in this context; a silent one by default."""
    return _LISTENER.get(_SILENT)


@contextmanager
def listening(to: Listener) -> Iterator[None]:
    """Within the block, what `listener()` gives."""
    token = _LISTENER.set(to)
    try:
        yield
    finally:
        _LISTENER.reset(token)
