"""Measures resident memory of this process and of those it started, with the standard library alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def reset_peak() -> None:
    """Forget earlier memory peaks; where the kernel does not allow it, peaks stay cumulative (an over-estimate)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Highest resident memory since the last reset."""
    with suppress(OSError, ValueError, IndexError):  # not ru_maxrss, which starts at what the parent used at the fork
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource  # absent on Windows, where a pipeline must load all the same

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def children_peak_rss_bytes() -> int:
    """Highest resident memory of any process that this one has waited for so far, theirs included."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
