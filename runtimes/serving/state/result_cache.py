"""Finished images by what they were made of, in memory; and equal requests that come at once, generated once.

A key holds the bundle's digest (`Order.key`), so that nothing in here is ever stale: a bundle that was built again has
other keys. It is not on disk: the images of jobs are, and after a restart the first request of a kind fills it again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from runtimes.serving.state.written_images import WrittenImage

T = TypeVar("T")
ENTRY_BYTES = 1024  # of an entry besides its images, rounded up


class ResultCache:
    """Images by key, the ones used longest ago leaving first. Safe to share between threads.

    Attributes:
        hits, misses: of `get`.
    """

    def __init__(self, most_bytes: int) -> None:
        """Hold images of so many bytes; 0 holds none."""
        self.most_bytes, self.bytes, self.hits, self.misses = most_bytes, 0, 0, 0
        self._entries: OrderedDict[str, tuple[WrittenImage, ...]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def entries(self) -> int:
        """Requests whose images it holds."""
        return len(self._entries)

    def get(self, key: str) -> tuple[WrittenImage, ...] | None:
        """The images of a key; None where it has none."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += self.most_bytes > 0
                return None
            self._entries.move_to_end(key)
            self.hits += 1
            return found

    def put(self, key: str, images: Sequence[WrittenImage]) -> None:
        """Hold images; those that are larger than the whole cache are not held."""
        images = tuple(images)
        size = _size(images)
        if size > self.most_bytes:
            return
        with self._lock:
            if (before := self._entries.pop(key, None)) is not None:
                self.bytes -= _size(before)
            self._entries[key] = images
            self.bytes += size
            while self.bytes > self.most_bytes:
                _, gone = self._entries.popitem(last=False)
                self.bytes -= _size(gone)


class SharedWork(Generic[T]):
    """Work by key, done once for all that ask for it while it is under way. For one event loop.

    Who is cancelled leaves the others their work; it is cancelled with the last of them.
    """

    def __init__(self) -> None:
        """Nothing is under way."""
        self._under_way: dict[str, _Work[T]] = {}

    async def get(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """What the work of a key gives, or raises.

        Args:
            key: names everything that it depends on.
            work: starts it; called only where none of this key is under way.
        """
        shared = self._under_way.get(key)
        if shared is None:
            shared = self._under_way[key] = _Work(asyncio.ensure_future(work()))
            shared.task.add_done_callback(lambda _: self._remove(key, shared))
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                self._remove(key, shared)  # who comes now starts anew
                shared.task.cancel()

    def _remove(self, key: str, shared: _Work[T]) -> None:
        if self._under_way.get(key) is shared:
            del self._under_way[key]


class _Work(Generic[T]):
    def __init__(self, task: asyncio.Future[T]) -> None:
        self.task, self.waiting = task, 0


def _size(images: Sequence[WrittenImage]) -> int:
    return ENTRY_BYTES + sum(len(image.content) for image in images)
