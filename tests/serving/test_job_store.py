"""Jobs on disk: one end each, none lost, whatever kills the process that holds them."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from runtimes.errors import InputError, UnavailableError
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import (
    CANCELLED,
    COMPLETED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    FullError,
    IdempotencyError,
    StoredJob,
)
from tests.serving.kill_worker import image_of

POINTS = ("before the job's commit", "after the job's commit", "after the claim", "before the image's fsync",
          "before the image's rename", "after the image's rename", "before the completion's commit",
          "after the completion's commit", "before unused images are removed")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock):
    with JobStore(tmp_path / "state", clock=clock) as opened:
        yield opened


def accepted(store: JobStore, number: int = 0, **options) -> StoredJob:
    return store.accept({"prompt": f"a cat {number}", "seed": number}, model="m", **options)


def test_a_job_goes_from_queued_over_running_to_completed(store):
    job = accepted(store)
    assert (job.status, job.attempts, job.request) == (QUEUED, 0, {"prompt": "a cat 0", "seed": 0})
    assert [j.id for j in store.claim("e", ["m"], 5)] == [job.id] and store.job(job.id).status == RUNNING
    assert store.complete(job.id, [(b"one", "png"), (b"two", "webp")], {"seconds": 1.5})
    done = store.job(job.id)
    assert (done.status, done.attempts, done.result, len(done.images)) == (COMPLETED, 1, {"seconds": 1.5}, 2)
    assert [store.image(i.sha256)[0] for i in done.images] == [b"one", b"two"]


def test_an_end_is_final(store):
    job = accepted(store)
    store.claim("e", ["m"], 1)
    assert store.cancel(job.id) and not store.complete(job.id, [(b"late", "png")], {}) and not store.fail(job.id, "x")
    assert store.job(job.id).status == CANCELLED and store.job(job.id).images == ()


def test_jobs_run_by_priority_then_by_age_and_only_of_models_that_are_served(store):
    jobs = [accepted(store, n, priority=p) for n, p in enumerate((0, 5, 0, 5))]
    store.accept({"prompt": "x"}, model="other", priority=-1)
    assert [store.progress(jobs[n].id).position + 1 for n in (1, 3, 0, 2)] == [1, 2, 3, 4]
    assert [j.id for j in store.claim("e", ["m"], 10)] == [jobs[n].id for n in (1, 3, 0, 2)]


def test_a_deadline_that_has_passed_ends_the_job_with_a_reason(store, clock):
    job = accepted(store, deadline=clock.now + 5)
    clock.now += 6
    assert store.claim("e", ["m"], 1) == [] and store.job(job.id).status == FAILED
    assert "deadline" in store.job(job.id).reason


def test_an_engine_that_stops_renewing_loses_its_jobs_to_another(store, clock):
    job = accepted(store)
    store.claim("dead", ["m"], 1, lease_seconds=10)
    clock.now += 9
    store.renew("dead", [job.id], lease_seconds=10)
    clock.now += 9
    assert store.claim("other", ["m"], 1) == []
    clock.now += 2
    assert [(j.id, j.attempts) for j in store.claim("other", ["m"], 1)] == [(job.id, 2)]


def test_the_same_idempotency_key_is_the_same_job_and_never_another_request(store):
    first = accepted(store, idempotency_key="k", owner="a")
    assert accepted(store, idempotency_key="k", owner="a").id == first.id
    assert accepted(store, idempotency_key="k", owner="b").id != first.id
    with pytest.raises(IdempotencyError, match="another request"):
        accepted(store, 1, idempotency_key="k", owner="a")
    assert store.counts()[QUEUED] == 2


def test_a_second_process_is_refused_the_folder(store):
    with pytest.raises(UnavailableError, match="another server"):
        JobStore(store.folder)


def test_a_store_of_a_newer_version_is_refused(store, tmp_path):
    store.close()
    with closing(sqlite3.connect(tmp_path / "state" / "jobs.sqlite3")) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="newer version"):
        JobStore(tmp_path / "state")


def test_what_was_running_is_queued_again_when_the_store_opens(store, tmp_path):
    jobs = [accepted(store, n) for n in range(3)]
    store.claim("e", ["m"], 2)
    store.complete(jobs[0].id, [(b"x", "png")], {})
    store.close()
    with JobStore(tmp_path / "state") as again:
        assert [again.job(j.id).status for j in jobs] == [COMPLETED, QUEUED, QUEUED]


def test_retention_forgets_the_oldest_and_keeps_images_that_another_job_has(store, clock):
    jobs = [accepted(store, n) for n in range(4)]
    for job, content in zip(store.claim("e", ["m"], 4), (b"a" * 100, b"b" * 100, b"a" * 100, b"c" * 100), strict=True):
        clock.now += 10
        store.complete(job.id, [(content, "png")], {})
    hashes = [store.job(j.id).images[0].sha256 for j in jobs]
    assert store.retain(seconds=1e6, image_bytes=300) == 0
    assert store.retain(seconds=1e6, image_bytes=250) == 2, "the first alone frees nothing: the third has its image"
    assert [store.image(h) is not None for h in hashes] == [True, False, True, True]
    assert len(list((store.folder / "images").iterdir())) == 2
    clock.now += 5
    assert store.retain(seconds=10, image_bytes=1000) == 1
    with pytest.raises(InputError, match="no such job"):
        store.job(jobs[2].id)


def test_a_full_disk_refuses_new_jobs_and_keeps_the_accepted(tmp_path, monkeypatch):
    with JobStore(tmp_path, reserve_bytes=0) as store:
        job = accepted(store)
        store.claim("e", ["m"], 1)
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        with pytest.raises(FullError, match="does not fit"):
            store.complete(job.id, [(b"image", "png")], {})
        monkeypatch.undo()
        store.requeue(job.id)
        assert store.job(job.id).status == QUEUED and list((tmp_path / "images").iterdir()) == []
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(FullError, match="the disk is full"):
            for number in range(10_000):
                accepted(store, number)
        assert store.job(job.id).status == QUEUED
    with JobStore(tmp_path, reserve_bytes=1 << 60) as store, pytest.raises(FullError):
        accepted(store)


def test_threads_share_a_store(store):
    ids: list[str] = []
    ended: list[bool] = []

    def client(part: int) -> None:
        for number in range(20):
            ids.append(accepted(store, part * 100 + number).id)

    def engine(name: str) -> None:
        while len(ended) < 80:
            ended.extend(store.complete(j.id, [(image_of(j.request), "png")], {}) for j in store.claim(name, ["m"], 3))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    threads += [threading.Thread(target=engine, args=(f"e{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(ids)) == 80 and ended == [True] * 80 and store.counts()[COMPLETED] == 80


def check_against_ledger(state: Path, ledger: Path) -> None:
    """Every accepted job is there, and ends once; completed ones have their image, whole."""
    lines = ledger.read_text(encoding="utf-8").split("\n")
    ids = [line for line in lines[:-1]]  # a line without its end was never acknowledged
    with JobStore(state, reserve_bytes=0) as store:
        assert store.counts()[RUNNING] == 0
        while jobs := store.claim("after", ["m"], 50):
            for job in jobs:
                assert store.complete(job.id, [(image_of(job.request), "png")], {})
        for identity in ids:
            job = store.job(identity)
            assert job.status in ENDED
            if job.status == COMPLETED:
                (image,) = job.images
                assert store.image(image.sha256) == (image_of(job.request), "png")
        assert not list((state / "images").glob("*.partial"))


def start(state: Path, ledger: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.serving.kill_worker", str(state), str(ledger), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_at_each_point_loses_no_accepted_job(tmp_path, point):
    ledger = tmp_path / "ledger"
    for count in (0, 3):
        process = start(tmp_path / "state", ledger, str(count), point, str(count))
        with process:
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
