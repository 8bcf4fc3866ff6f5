"""Shows what a long command does, on standard error: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runtimes.system.progress import Listener, listening

EVERY_SECONDS = 15.0  # between two lines about the same work, where there is no terminal


@contextmanager
def shown_progress(console: Console) -> Iterator[Listener]:
    """Within the block, what library code reports is shown.

    Args:
        console: on standard error.
    """
    display = _Bar(console) if console.is_terminal else _Lines(console)
    with display, listening(display):
        yield display


class _Bar:
    """One bar for what is being done now, above it the lines of what is finished."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20),
                              TextColumn("{task.fields[count]}", markup=False), TimeElapsedColumn(),
                              TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bars.add_task("planning", total=None, count="")

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def working(self, text: str) -> None:
        self._bars.reset(self._task, total=None, description=text, count="")

    def advanced(self, done: int, total: int, unit: str) -> None:
        self._bars.update(self._task, completed=done, total=total, count=f"{done} of {total} {unit}")

    def finished(self, text: str) -> None:
        self._console.print(text)


@dataclass(frozen=True)
class _Count:
    done: int
    total: int
    unit: str
    at_seconds: float


class _Work:
    """What is being done, since when, and how far it has got; seconds are of `time.monotonic`."""

    def __init__(self, text: str, now_seconds: float) -> None:
        self._text, self._began = text, now_seconds
        self._first: _Count | None = None
        self._last: _Count | None = None

    def advanced(self, count: _Count) -> None:
        self._first, self._last = self._first or count, count

    def line(self, now_seconds: float) -> str:
        """What it is, how far it has got, and how long it takes yet or has taken."""
        if self._first is None or self._last is None:
            return f"{self._text}: {_duration(now_seconds - self._began)} so far"
        # From the first count on: what was done before an interruption was counted in no time.
        counted, last = self._last.done - self._first.done, self._last
        left = (last.at_seconds - self._first.at_seconds) / counted * (last.total - last.done) if counted > 0 else None
        time_left = f"{_duration(now_seconds - self._began)} so far" if left is None else f"{_duration(left)} left"
        return f"{self._text}: {last.done} of {last.total} {last.unit}, {time_left}"


class _Lines:
    """Lines of what is finished, and one every `EVERY_SECONDS` about what is not, from a thread of its own: much of
    the work is one long call into a library."""

    def __init__(self, console: Console) -> None:
        self._console, self._over = console, threading.Event()
        self._work = _Work("planning", time.monotonic())
        self._thread = threading.Thread(target=self._tell_now_and_then, name="progress", daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def working(self, text: str) -> None:
        self._work = _Work(text, time.monotonic())

    def advanced(self, done: int, total: int, unit: str) -> None:
        self._work.advanced(_Count(done, total, unit, time.monotonic()))

    def finished(self, text: str) -> None:
        self._console.print(text)

    def _tell_now_and_then(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._console.print(self._work.line(time.monotonic()))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
