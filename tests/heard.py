"""A listener that remembers what it heard."""

from __future__ import annotations


class Heard:
    """Texts in the order they came, and how far what was started last has got."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.said: list[str] = []
        self.counts: list[tuple[int, int, str]] = []

    def working(self, text: str) -> None:
        self.started.append(text)

    def advanced(self, done: int, total: int, unit: str) -> None:
        self.counts.append((done, total, unit))

    def finished(self, text: str) -> None:
        self.said.append(text)
