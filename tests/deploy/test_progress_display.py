"""Where standard error is no terminal: lines of what is finished, and now and then one with the time left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from deploy.cli import progress_display
from deploy.cli.progress_display import _Count, _Work, shown_progress
from runtimes.system.progress import listener


def test_the_time_left_follows_from_what_was_done_since_the_first_count():
    work = _Work("calibrating", 100.0)
    assert work.line(130.0) == "calibrating: 30 s so far"
    work.advanced(_Count(900, 1000, "calls", 130.0))  # what an interrupted run had done
    assert work.line(131.0) == "calibrating: 900 of 1000 calls, 31 s so far"
    work.advanced(_Count(910, 1000, "calls", 150.0))
    assert work.line(151.0) == "calibrating: 910 of 1000 calls, 3.0 min left"


def test_a_line_comes_now_and_then_though_the_work_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_display, "EVERY_SECONDS", 0.01)
    stream = io.StringIO()
    with shown_progress(Console(file=stream, markup=False, emoji=False, soft_wrap=True)):
        listener().working("one long call")
        deadline = time.monotonic() + 30
        while "one long call: 0 s so far" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        listener().finished("it is done")
    assert "it is done" in stream.getvalue().splitlines()
    length = len(stream.getvalue())
    listener().finished("nobody listens any more")
    time.sleep(0.05)
    assert len(stream.getvalue()) == length


@pytest.mark.parametrize("unit", ["steps", "steps [loss 0.1]"])
def test_a_terminal_gets_a_bar_with_the_count(unit: str):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, markup=False, emoji=False)
    with shown_progress(console):
        listener().working("learning [fast]")
        listener().advanced(3, 10, unit)
        listener().finished("learned")
    assert "learning [fast]" in stream.getvalue() and f"3 of 10 {unit}" in stream.getvalue()
    assert "learned" in stream.getvalue()
