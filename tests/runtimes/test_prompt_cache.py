"""The cache of embedded prompts: bounded, least recently used goes first, safe under threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from runtimes.text.prompt_cache import PromptCache


def block(value: int, kilobytes: int = 1) -> np.ndarray:
    return np.full(kilobytes * 256, value, np.float32)


def test_the_least_recently_used_entry_goes_first():
    cache = PromptCache(3 * 1024)
    for i in range(3):
        cache.put(bytes([i]), block(i))
    assert cache.get(b"\0") is not None
    cache.put(b"new", block(9))
    assert cache.get(b"\1") is None and cache.get(b"\0") is not None and cache.get(b"\2") is not None
    assert cache.stats.bytes == 3 * 1024 and cache.stats.entries == 3


def test_the_bound_holds_for_large_entries_and_replacements():
    cache = PromptCache(2 * 1024)
    cache.put(b"a", block(1))
    cache.put(b"a", block(2))
    assert cache.stats.bytes == 1024
    cache.put(b"huge", block(3, 5))
    assert cache.stats.entries == 0 and cache.stats.bytes == 0


def test_entries_are_read_only_and_hits_are_counted():
    cache = PromptCache(4096)
    assert cache.stats.hit_rate == 0
    assert cache.get(b"a") is None
    cache.put(b"a", block(1))
    found = cache.get(b"a")
    assert found is not None and cache.stats.hit_rate == 0.5
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


def test_threads_never_break_the_count_of_bytes():
    cache = PromptCache(8 * 1024)

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 20, 500):
            found = cache.get(bytes([key]))
            if found is None:
                cache.put(bytes([key]), block(int(key)))
            else:
                assert found[0] == key

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats
    assert stats.bytes == stats.entries * 1024 <= 8 * 1024
    assert stats.hits + stats.misses == 2000
