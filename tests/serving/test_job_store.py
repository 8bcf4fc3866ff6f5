"""Jobs on disk: one end each, none lost, whatever kills the process that holds them."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from runtimes.errors import InputError, UnavailableError
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FORGOTTEN,
    QUEUED,
    RUNNING,
    FullError,
    IdempotencyError,
    JobProgress,
    NoJobError,
    StoredJob,
)
from tests.serving.kill_worker import image_of


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


def test_clients_files_are_on_disk_by_content_and_go_with_the_last_job_that_has_them(store, clock):
    one, two = b"a mask", b"an image"
    named = {hashlib.sha256(content).hexdigest(): content for content in (one, two)}
    first = accepted(store, files=named)
    second = accepted(store, 1, files={hashlib.sha256(one).hexdigest(): one})
    assert store.files(first.id) == named and len(list((store.folder / "inputs").iterdir())) == 2
    assert store.image(hashlib.sha256(one).hexdigest()) is None, "a client's file is no generated image"
    for job in (first, second):
        clock.now += 10
        store.cancel(job.id)
    assert store.retain(seconds=1e6, image_bytes=len(one)) == 1
    assert store.files(second.id) == {hashlib.sha256(one).hexdigest(): one}
    assert len(list((store.folder / "inputs").iterdir())) == 1
    assert store.retain(seconds=1e6, image_bytes=0) == 1 and list((store.folder / "inputs").iterdir()) == []


def test_a_full_disk_accepts_no_file_and_no_job_but_answers_who_asks_again(tmp_path, monkeypatch):
    with JobStore(tmp_path, reserve_bytes=0) as store:
        job = accepted(store, idempotency_key="k")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
        with pytest.raises(FullError, match="does not fit"):
            accepted(store, 1, files={hashlib.sha256(b"x").hexdigest(): b"x"})
        monkeypatch.undo()
        assert list((tmp_path / "inputs").iterdir()) == [] and store.counts()[QUEUED] == 1
    with JobStore(tmp_path, reserve_bytes=1 << 60) as store:
        assert accepted(store, idempotency_key="k").id == job.id
        with pytest.raises(FullError):
            accepted(store, idempotency_key="other")
        with pytest.raises(FullError):
            store.record({}, [(b"x", "png")], {}, model="m")


def test_a_key_is_compared_with_what_the_client_sent_not_with_the_seeds_that_were_chosen(store):
    first = accepted(store, 1, idempotency_key="k", fingerprint="body")
    assert accepted(store, 2, idempotency_key="k", fingerprint="body").id == first.id
    with pytest.raises(IdempotencyError):
        accepted(store, 1, idempotency_key="k", fingerprint="another body")


def test_one_key_at_once_is_one_job(store):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(accepted(store, idempotency_key="k").id))
               for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12 and len(set(found)) == 1 and store.counts()[QUEUED] == 1


def test_jobs_of_another_owner_are_not_there(store):
    mine, theirs = accepted(store, owner="me"), accepted(store, owner="them")
    for call in (store.job, store.cancel, store.forget, store.progress):
        with pytest.raises(NoJobError):
            call(theirs.id, owner="me")
    assert store.job(theirs.id).status == QUEUED and [job.id for job in store.jobs("me")] == [mine.id]
    assert store.jobs("me", before=theirs.id) == [] and store.cancel(mine.id, owner="me")


def test_an_owners_jobs_are_listed_the_newest_first_in_pages_and_by_status(store):
    ids = [accepted(store, number).id for number in range(7)]
    pages = [store.jobs("", most=3)]
    while pages[-1]:
        pages.append(store.jobs("", most=3, before=pages[-1][-1].id))
    assert [job.id for page in pages for job in page] == ids[::-1] and [len(page) for page in pages] == [3, 3, 1, 0]
    store.cancel(ids[2]), store.cancel(ids[5])
    assert [job.id for job in store.jobs("", statuses=(CANCELLED,))] == [ids[5], ids[2]]
    assert len(store.jobs("", statuses=(QUEUED, CANCELLED))) == 7


def test_ids_cannot_be_guessed(store):
    ids = [accepted(store, number).id for number in range(50)]
    assert len(set(ids)) == 50 and all(len(identity) == 32 for identity in ids)
    assert len({identity[:4] for identity in ids}) > 40, "not a counter, not a clock"


def test_what_was_generated_without_a_job_can_be_recorded_and_is_retained_like_others(store, clock):
    job = store.record({"prompt": "x"}, [(b"one", "png")], {"digest": "d"}, model="m", owner="o")
    (image,) = job.images
    assert store.job(job.id, owner="o") == job and store.image(image.sha256) == (b"one", "png")
    assert job.status == COMPLETED and store.claim("e", None, 5) == []
    clock.now += 10
    assert store.retain(seconds=5, image_bytes=1000) == 1 and store.image(image.sha256) is None


def test_ended_jobs_can_be_forgotten_with_their_images_and_open_ones_cannot(store):
    jobs = [accepted(store, number) for number in range(2)]
    for job in store.claim("e", ["m"], 2):
        assert not store.forget(job.id)
        store.complete(job.id, [(b"the same", "png")], {})
    number = store.changes(-1, 0).number
    assert store.forget(jobs[0].id) and store.changes(number, 5).jobs == {jobs[0].id: FORGOTTEN}
    sha256 = store.job(jobs[1].id).images[0].sha256
    assert store.image(sha256) is not None and store.forget(jobs[1].id) and store.image(sha256) is None
    assert list((store.folder / "images").iterdir()) == []


def test_a_change_wakes_whoever_waits_and_names_the_jobs(store):
    number = store.changes(-1, 0).number
    assert store.changes(number, 0.01).jobs == {}
    timer = threading.Timer(0.05, accepted, (store,))
    timer.start()
    seen = store.changes(number, 30)
    timer.join()
    assert list(seen.jobs.values()) == [QUEUED] and not seen.missed
    (job,) = store.claim("e", ["m"], 1)
    store.report(job.id, JobProgress(RUNNING, step=1, total=4, preview=b"png", preview_step=1))
    store.report(job.id, JobProgress(RUNNING, step=2, total=4))
    assert store.changes(seen.number, 30).jobs == {job.id: RUNNING}
    assert store.progress(job.id) == JobProgress(RUNNING, step=2, total=4, preview=b"png", preview_step=1)
    store.complete(job.id, [(b"x", "png")], {})
    store.report(job.id, JobProgress(RUNNING, step=3, total=4))
    assert store.progress(job.id) == JobProgress(COMPLETED), "a late report changes nothing"


def test_who_looks_too_seldom_or_knew_another_store_is_sent_to_look_at_everything(store):
    start = store.changes(-1, 0).number
    assert store.changes(start + 1000, 5).missed, "a number from before a restart"
    store._board._most = 4
    ids = [accepted(store, number).id for number in range(6)]
    assert store.changes(start, 5).missed
    assert list(store.changes(start + 4, 5).jobs) == ids[:3:-1]


def test_only_the_present_attempt_fails_or_puts_back_a_job(store, clock):
    job = accepted(store)
    (old,) = store.claim("slow", ["m"], 1, lease_seconds=10)
    clock.now += 11
    (new,) = store.claim("other", ["m"], 1, lease_seconds=10)
    assert not store.fail(job.id, "late", attempt=old.attempts)
    store.requeue(job.id, attempt=old.attempts)
    store.renew("slow", [job.id], lease_seconds=100)
    assert store.job(job.id).status == RUNNING
    clock.now += 11
    assert [j.attempts for j in store.claim("third", ["m"], 1)] == [3], "another engine's lease was not renewed"
    assert store.complete(job.id, [(b"x", "png")], {}), "whoever made it: the images are the same"
    assert new.attempts == 2 and not store.complete(job.id, [(b"x", "png")], {})


def test_a_job_fails_after_its_attempts_and_those_that_cost_none_do_not_count(tmp_path):
    with JobStore(tmp_path, reserve_bytes=0) as store:
        poison, good = accepted(store), accepted(store, 1)
        for _ in range(5):
            for job in store.claim("e", ["m"], 2):
                store.requeue(job.id, attempt=job.attempts)
        assert [store.job(j.id).attempts for j in (poison, good)] == [0, 0]
        store.cancel(good.id)
    for attempt in (1, 2, 3):
        with JobStore(tmp_path, reserve_bytes=0) as store:
            assert [j.attempts for j in store.claim("e", ["m"], 2)] == [attempt]
    with JobStore(tmp_path, reserve_bytes=0) as store:
        assert store.job(poison.id).status == FAILED and "3 times" in store.job(poison.id).reason


def test_waiting_makes_up_for_priority_so_that_no_job_waits_for_ever(store, clock):
    old = accepted(store)
    clock.now += 3 * 600 - 1
    urgent = accepted(store, 1, priority=3)
    clock.now += 2
    late = accepted(store, 2, priority=3)
    assert [j.id for j in store.claim("e", None, 3)] == [urgent.id, old.id, late.id]


def test_files_without_a_job_are_removed_when_the_store_opens(tmp_path):
    with JobStore(tmp_path, reserve_bytes=0) as store:
        job = accepted(store, files={hashlib.sha256(b"x").hexdigest(): b"x"})
        (claimed,) = store.claim("e", ["m"], 1)
        store.complete(claimed.id, [(b"image", "png")], {})
    for name in ("images/stray.png", "images/half.partial", "inputs/stray.input"):
        (tmp_path / name).write_bytes(b"?")
    with JobStore(tmp_path, reserve_bytes=0) as store:
        assert len(list((tmp_path / "images").iterdir())) == len(list((tmp_path / "inputs").iterdir())) == 1
        assert store.files(job.id) and store.image(store.job(job.id).images[0].sha256) == (b"image", "png")


def test_images_that_are_being_stored_are_not_removed_by_retention(tmp_path):
    """A retention between an image's rename and its job's commit, which a forgotten job had the same image of."""
    def checkpoint(name: str) -> None:
        if name == "before the completion's commit" and len(done) == 1:
            assert store.retain(seconds=-1, image_bytes=0) == 1

    done: list[str] = []
    with JobStore(tmp_path, reserve_bytes=0, checkpoint=checkpoint) as store:
        for number in range(2):
            accepted(store, number)
            (job,) = store.claim("e", ["m"], 1)
            assert store.complete(job.id, [(b"the same", "png")], {})
            done.append(job.id)
        assert store.image(store.job(done[1]).images[0].sha256) == (b"the same", "png")


def test_a_damaged_image_is_never_given_out(store):
    accepted(store)
    (job,) = store.claim("e", ["m"], 1)
    store.complete(job.id, [(b"image", "png")], {})
    sha256 = store.job(job.id).images[0].sha256
    (store.folder / "images" / f"{sha256}.png").write_bytes(b"imagE")
    with pytest.raises(UnavailableError, match="changed on the disk"):
        store.image(sha256)


def test_what_cannot_be_stored_as_json_is_refused_by_name(store):
    with pytest.raises(InputError, match="cannot be stored"):
        store.accept({"guidance_scale": float("nan")}, model="m")
    job = accepted(store)
    store.fail(job.id, "half of a pair: \ud800")
    assert store.job(job.id).reason == "half of a pair: ?"
    (other,) = (store.accept({"prompt": "\ud800"}, model="m"),)
    assert store.job(other.id).request == {"prompt": "\ud800"}
