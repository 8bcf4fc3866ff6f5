"""What is measured around a pass without the pass knowing: seconds, peak memory, bytes in and out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtimes.memory import peak_rss_bytes, reset_peak

__all__ = ["Measurement", "measured", "peak_rss_bytes", "reset_peak"]


@dataclass
class Measurement:
    """Cost of one piece of work.

    Attributes:
        seconds: wall clock.
        peak_rss_bytes: highest resident memory of this process during the work.
    """

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure the block; the result is filled in when it ends."""
    result = Measurement()
    reset_peak()
    began = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - began
        result.peak_rss_bytes = peak_rss_bytes()
