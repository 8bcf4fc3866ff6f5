"""`kill -9` of the process that holds a store: what was acknowledged before is there after, and has one end.

It proves nothing about a loss of power: the kernel lives on and writes what the process has given it.
`python -m tests.serving.kills` does the same to a whole server.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import COMPLETED, ENDED, FAILED, RUNNING
from runtimes.text.clip_tokenizer import prepare_tokenizer
from tests.runtimes.fakes import write_pipeline_bundle
from tests.runtimes.vocabulary import make_vocabulary
from tests.serving.kill_worker import POINTS, image_of
from tests.serving.kills import trial


def check_against_ledger(state: Path, ledger: Path) -> None:
    """Every accepted job is there, and ends once, as its client heard; completed ones have their image, whole."""
    text = ledger.read_text(encoding="utf-8") if ledger.exists() else ""
    ends: dict[str, str] = {}
    for line in text.split("\n")[:-1]:  # a line without its end was never acknowledged
        identity, status = line.split()
        assert ends.setdefault(identity, status) in ("accepted", status), "two ends"
        ends[identity] = status
    with JobStore(state, reserve_bytes=0) as store:
        assert store.counts()[RUNNING] == 0
        while jobs := store.claim("after", ["m"], 50):
            for job in jobs:
                assert list(store.files(job.id)) == [job.request["file"]]
                assert store.complete(job.id, [(image_of(job.request), "png")], {})
        for identity, heard in ends.items():
            job = store.job(identity)
            assert job.status in ENDED and heard in ("accepted", job.status)
            if job.status == COMPLETED:
                (image,) = job.images
                assert store.image(image.sha256) == (image_of(job.request), "png")
            assert job.status != FAILED or job.reason
        assert not list((state / "images").glob("*.partial")) + list((state / "inputs").glob("*.partial"))


def start(state: Path, ledger: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.serving.kill_worker", str(state), str(ledger), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_at_each_point_loses_no_accepted_job(tmp_path, point):
    ledger = tmp_path / "ledger"
    for count in (0, 3):
        with start(tmp_path / "state", ledger, str(count), point, str(count)) as process:
            assert process.wait(60) == -signal.SIGKILL
        check_against_ledger(tmp_path / "state", ledger)


@pytest.mark.slow
def test_kill_9_ten_times_at_each_point_and_a_hundred_at_random_moments(tmp_path):
    ledger, state = tmp_path / "ledger", tmp_path / "state"
    for point in POINTS:
        for count in range(10):
            with start(state, ledger, str(count), point, str(count)) as process:
                assert process.wait(60) == -signal.SIGKILL
            check_against_ledger(state, ledger)
    for number in range(100):
        with start(state, ledger, str(1000 + number)) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(0.001 * (number * 37 % 250))
            process.kill()
        check_against_ledger(state, ledger)


@pytest.mark.slow
def test_a_whole_server_is_killed_at_each_point_and_its_clients_ledger_holds(tmp_path):
    from transformers import CLIPTokenizer

    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5).save_pretrained(tmp_path / "source")
    prepare_tokenizer(tmp_path / "source", tmp_path / "bundle" / "tokenizer")
    write_pipeline_bundle(tmp_path / "bundle", len(vocab) + 1)
    outcome = trial(tmp_path / "bundle", tmp_path, each=1, at_random=4, seed=3)
    assert outcome.faults == [] and sum(outcome.kills.values()) == len(POINTS) + 4
