"""Progress reaches who listens, also from a child process, and nothing else that a child prints does."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.system.child_process import last_words, run_child
from runtimes.system.progress import Silent, listener, listening
from tests.heard import Heard

CHILD = '''"""Reports, prints, may start a child of its own, may be killed in the middle of a report."""
import os, pathlib, signal, subprocess, sys
from runtimes.system.child_process import as_child, run_child
from runtimes.system.progress import listener
with as_child():
    todo = pathlib.Path(sys.argv[1])
    listener().working(f"child {todo.name}")
    print("printed", flush=True)
    subprocess.run([sys.executable, "-c", "print('by another program')"], check=True)
    for done in range(1, 1001):
        listener().advanced(done, 1000, "steps")
    if todo.name == "outer":
        assert run_child("reports", todo.with_name("inner"), todo.with_name("inner.log")) == 0
    if todo.name == "killed":
        listener()._channel.write(b'{"progress": ["finis')
        os.kill(os.getpid(), signal.SIGKILL)
    listener().finished("done: ü")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reports.py").write_text(CHILD, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_nobody_listens_by_default_and_only_within_the_block_else() -> None:
    heard = Heard()
    assert isinstance(listener(), Silent)
    with listening(heard):
        listener().finished("within")
    listener().finished("after")
    assert heard.said == ["within"]


def test_a_child_reports_to_its_parent_and_what_is_printed_goes_to_the_log(folder: Path) -> None:
    with listening(heard := Heard()):
        assert run_child("reports", folder / "plain", folder / "log") == 0
    assert (heard.started, heard.said) == (["child plain"], ["done: ü"])
    assert heard.counts[-1] == (1000, 1000, "steps")
    assert len(heard.counts) < 500, "what advances fast is thinned out"
    assert (folder / "log").read_text().splitlines() == ["printed", "by another program"]


def test_a_childs_child_is_heard_too(folder: Path) -> None:
    with listening(heard := Heard()):
        assert run_child("reports", folder / "outer", folder / "log") == 0
    assert heard.started == ["child outer", "child inner"]
    assert heard.said == ["done: ü"] * 2


def test_a_report_that_was_cut_off_is_no_last_word(folder: Path) -> None:
    with listening(heard := Heard()):
        assert run_child("reports", folder / "killed", folder / "log") == -9
    assert heard.said == []
    assert last_words(folder / "log") == "by another program"
