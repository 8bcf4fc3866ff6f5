"""Runs a module of ours in a process of its own, which writes to a log and does not outlive the process that asked."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_SET_DEATH_SIGNAL = 1


def run_child(module: str, argument: Path, log: Path) -> int:
    """`python -m MODULE ARGUMENT` with this process's import paths.

    Args:
        module: to run; it should call `die_with_parent` first.
        argument: its only one.
        log: receives what it prints.

    Returns:
        its exit code; the negative number of the signal that ended it.
    """
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with log.open("wb") as stream:
        child = subprocess.Popen([sys.executable, "-m", module, str(argument)], stdin=subprocess.DEVNULL,
                                 stdout=stream, stderr=stream, env={**os.environ, "PYTHONPATH": paths})
        try:
            return child.wait()
        except BaseException:  # Ctrl-C: nothing goes on in the background
            child.kill()
            child.wait()
            raise


def die_with_parent() -> None:
    """A process whose parent was killed must not go on for minutes (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def last_words(log: Path) -> str:
    """The last line that a child printed, cut to 300 characters."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1]:.300}" if lines else "it said nothing"
