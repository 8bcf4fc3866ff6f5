"""A child process ends with who asked for it, and its end is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtimes.system.child_process import last_words, run_child

CHILD = '''"""Writes its process number, then waits to be ended."""
import os, pathlib, sys, time
from runtimes.system.child_process import die_with_parent
die_with_parent()
file = pathlib.Path(sys.argv[1])
file.with_suffix(".partial").write_text(str(os.getpid()))
file.with_suffix(".partial").rename(file)
print("working", flush=True)
if file.name == "waits":
    time.sleep(600)
sys.exit(5)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_exit_code_and_the_last_words_are_reported(folder: Path) -> None:
    assert run_child("a_child", folder / "ends", folder / "log") == 5
    assert last_words(folder / "log") == "working"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_child_does_not_outlive_a_parent_that_is_ended(folder: Path, by: signal.Signals) -> None:
    # A shell in the background leaves SIGINT ignored.
    code = ("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"import pathlib, runtimes.system.child_process\nfolder = pathlib.Path({str(folder)!r})\n"
            "runtimes.system.child_process.run_child('a_child', folder / 'waits', folder / 'log')")
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.getcwd()])})
    child = int(_read_when_there(folder / "waits"))
    parent.send_signal(by)
    assert parent.wait(30) != 0
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.05)


def _read_when_there(file: Path) -> str:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return file.read_text()


def _runs(process: int) -> bool:
    """Not gone, and not a zombie that nobody has buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
