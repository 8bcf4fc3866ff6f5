"""Remembers the hashes of large files, for as long as the file system says that nobody wrote to them.

For each content there is one note in the cache, with the state of the file that had it. The times in it are the
kernel's; a copy, a link and whatever is written make another state.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use

ABOVE_BYTES = 64 << 20  # smaller ones are hashed in the time that it takes to look for a note
SETTLED_SECONDS = 2  # a file system's clock is coarse: what was just written may be written again at the same time

State = tuple[int, ...]


def state_of(path: Path) -> State:
    """Device, inode, size, and when contents and inode were last changed, in nanoseconds."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def was_checked(state: State, sha256: str) -> bool:
    """Whether a file in this state is known to have these contents."""
    if not use(_note(sha256)):
        return False
    try:
        known: object = json.loads(_note(sha256).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return known == list(state)


def remember(state: State, sha256: str) -> None:
    """Note that a file had these contents; `state` was taken before they were read.

    Where nothing can be written, nothing is noted."""
    if time.time_ns() - state[-1] < SETTLED_SECONDS * 10**9:
        return
    note = _note(sha256)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{time.time_ns()}")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(note)


def _note(sha256: str) -> Path:
    return cache_home() / "checked" / f"{sha256}.json"
