"""Measures from outside what a pass, or another piece of work, costs: seconds and peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runtimes.system.process_memory import children_peak_rss_bytes, peak_rss_bytes, reset_peak


@dataclass
class Measurement:
    """Cost of one piece of work.

    Attributes:
        seconds: wall clock.
        peak_rss_bytes: highest resident memory of this process during the work, or of a process that it started.
    """

    seconds: float = 0.0
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure the block; the result is filled in when it ends."""
    result = Measurement()
    reset_peak()
    began, children = time.perf_counter(), children_peak_rss_bytes()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - began
        result.peak_rss_bytes = peak_rss_bytes()
        if (after := children_peak_rss_bytes()) > children:  # the kernel keeps only the highest of all times
            result.peak_rss_bytes = max(result.peak_rss_bytes, after)
