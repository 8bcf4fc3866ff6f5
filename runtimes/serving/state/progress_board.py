"""What changes while jobs run, in memory alone: how far each is, and which ones changed since somebody looked."""

from __future__ import annotations

import threading
from collections import OrderedDict

from runtimes.serving.state.store import QUEUED, Changes, JobProgress

MOST_REMEMBERED = 4096  # changes of jobs; who looks more seldom is sent to look at everything


class ProgressBoard:
    """Progress by job, and a number that every change counts up. Safe to share between threads."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        """Remember at most so many changes."""
        self._most, self._number, self._forgotten = most, 0, 0
        self._progress: dict[str, JobProgress] = {}
        self._changed: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._condition = threading.Condition()

    def put(self, identity: str, progress: JobProgress) -> None:
        """A job went on. A preview stays until the next one."""
        with self._condition:
            before = self._progress.get(identity)
            if progress.preview is None and before is not None and before.preview is not None:
                progress = JobProgress(progress.status, progress.position, progress.step, progress.total,
                                       before.preview, before.preview_step)
            self._progress[identity] = progress
            self._note(identity, progress.status)

    def note(self, identity: str, status: str) -> None:
        """A job's status changed: what was known of its progress is dropped."""
        with self._condition:
            self._progress.pop(identity, None)
            self._note(identity, status)

    def get(self, identity: str) -> JobProgress | None:
        """How far a job is, as it was reported."""
        with self._condition:
            return self._progress.get(identity)

    def waiting(self) -> int:
        """Jobs that an engine has without having started them."""
        with self._condition:
            return sum(progress.status == QUEUED for progress in self._progress.values())

    def changes(self, after: int, seconds: float) -> Changes:
        """Wait for changes after a number, at most so long."""
        with self._condition:
            if after < 0:
                return Changes(self._number)
            self._condition.wait_for(lambda: self._number != after, seconds)
            if after > self._number or after < self._forgotten:  # of a store before a restart, or too long ago
                return Changes(self._number, missed=True)
            found: dict[str, str] = {}
            for identity, (number, status) in reversed(self._changed.items()):
                if number <= after:
                    break
                found[identity] = status
            return Changes(self._number, found)

    def _note(self, identity: str, status: str) -> None:
        self._number += 1
        self._changed[identity] = (self._number, status)
        self._changed.move_to_end(identity)
        while len(self._changed) > self._most:
            _, (number, _) = self._changed.popitem(last=False)
            self._forgotten = max(self._forgotten, number)
        self._condition.notify_all()
