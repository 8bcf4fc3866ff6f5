"""`Rate`: how many images are finished in a second, lately."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

WINDOW_SECONDS = 60.0


class Rate:
    """Counts what was finished in the last minute. Any thread may add and ask."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Count from now on."""
        self._clock, self._began, self._lock = clock, clock(), threading.Lock()
        self._finished: deque[tuple[float, int]] = deque()

    def add(self, images: int) -> None:
        """So many were finished now."""
        with self._lock:
            self._finished.append((self._clock(), images))
            self._forget()

    def per_second(self) -> float:
        """Of the last minute, or of the time since the start where that is shorter; 0 before the first."""
        with self._lock:
            self._forget()
            seconds = min(WINDOW_SECONDS, max(self._clock() - self._began, 1.0))
            return sum(images for _, images in self._finished) / seconds

    def _forget(self) -> None:
        while self._finished and self._finished[0][0] < self._clock() - WINDOW_SECONDS:
            self._finished.popleft()
