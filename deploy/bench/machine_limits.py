"""Measures what this machine can do at best: arithmetic of a large matrix product, and bytes moved in memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

SIZE = 1536  # rows and columns: large enough for full speed, small enough for every machine
COPY_BYTES = 256 << 20  # above every cache
REPEATS = 5


def gemm_flops() -> float:
    """Floating-point operations a second of a square float32 product on all cores; the best of several."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2))
    return 2.0 * SIZE**3 / _best(lambda: a @ b)


def bandwidth() -> float:
    """Bytes a second read and written by a copy that no cache holds; one thread, as numpy copies."""
    source = np.ones(COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    return 2.0 * COPY_BYTES / _best(lambda: np.copyto(target, source))


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
