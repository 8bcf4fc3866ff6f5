"""A least-recently-used cache of embedded prompts, bounded in bytes and safe to share between threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of the cache.

    Attributes:
        bytes: size of the arrays it holds.
    """

    hits: int
    misses: int
    entries: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that were answered, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class PromptCache:
    """Stores the embedding of token ids. An entry larger than the whole bound is not stored.

    Every array is one prompt's embedding, (tokens, width) or pooled (width,), float32, read-only.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, NDArray[Any]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: bytes) -> NDArray[Any] | None:
        """The read-only array stored under `key`, or None."""
        with self._lock:
            array = self._entries.get(key)
            if array is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return array

    def __contains__(self, key: bytes) -> bool:
        """Whether an array is stored under `key`; asking is neither hit nor miss."""
        with self._lock:
            return key in self._entries

    def put(self, key: bytes, array: NDArray[Any]) -> None:
        """Store an array, which becomes read-only, and drop the least recently used ones beyond the bound."""
        array = np.ascontiguousarray(array)
        array.setflags(write=False)
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self._bytes -= old.nbytes
            self._entries[key] = array
            self._bytes += array.nbytes
            while self._bytes > self._max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.nbytes

    def grow(self, max_bytes: int) -> None:
        """Raise the bound, if it is below `max_bytes`."""
        with self._lock:
            self._max_bytes = max(self._max_bytes, max_bytes)

    @property
    def stats(self) -> CacheStats:
        """Hits, misses and size so far."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._entries), self._bytes)
