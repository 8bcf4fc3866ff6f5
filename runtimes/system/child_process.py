"""Runs a module of ours in a process of its own: its progress is passed on, it writes to a log, and it ends with us."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from runtimes.system.progress import listener, listening

_SET_DEATH_SIGNAL = 1
_MARK = b'{"progress": '  # begins a line that a child writes for the listener of its parent
REPORT_EVERY_SECONDS = 0.2


def run_child(module: str, argument: Path, log: Path) -> int:
    """`python -m MODULE ARGUMENT` with this process's import paths.

    Args:
        module: to run; it should work within `as_child`.
        argument: its only one.
        log: receives what it prints.

    Returns:
        its exit code; the negative number of the signal that ended it.
    """
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with log.open("ab") as stream, subprocess.Popen(
            [sys.executable, "-m", module, str(argument)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=stream, env={**os.environ, "PYTHONPATH": paths}) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if not _pass_on(line):
                    stream.write(line)
                    stream.flush()
            return child.wait()
        except BaseException:  # Ctrl-C: nothing goes on in the background
            child.kill()
            raise


def _pass_on(line: bytes) -> bool:
    """Whether a line is progress; the listener then hears of it."""
    if not line.startswith(_MARK):
        return False
    try:
        method, *arguments = json.loads(line)["progress"]
    except ValueError:  # the child was killed in the middle of it
        return True
    getattr(listener(), method)(*arguments)
    return True


@contextmanager
def as_child() -> Iterator[None]:
    """What a child's work is done within: progress goes to the parent, all else that is printed to the log."""
    die_with_parent()
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb", buffering=0) as channel:
        os.dup2(2, 1)
        with listening(_Parent(channel)):
            yield


class _Parent:
    """The listener of a child: JSON lines on a pipe, of what advances fast only some."""

    def __init__(self, channel: IO[bytes]) -> None:
        self._channel, self._last = channel, 0.0

    def working(self, text: str) -> None:
        self._write("working", text)

    def advanced(self, done: int, total: int, unit: str) -> None:
        if done >= total or time.monotonic() - self._last > REPORT_EVERY_SECONDS:
            self._last = time.monotonic()
            self._write("advanced", done, total, unit)

    def finished(self, text: str) -> None:
        self._write("finished", text)

    def _write(self, *message: str | int) -> None:
        with suppress(OSError):  # the parent is gone, and so will be this process
            self._channel.write(json.dumps({"progress": message}).encode() + b"\n")


def die_with_parent() -> None:
    """A process whose parent was killed must not go on for minutes (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def last_words(log: Path) -> str:
    """The last line that a child printed, cut to 300 characters."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1]:.300}" if lines else "it said nothing"
