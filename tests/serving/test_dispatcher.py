"""Jobs from a store through a pool and back: each ends once, whatever the pool, the disk and the clients do."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import CancelledError, InputError, UnavailableError
from runtimes.inputs.noise import resolve_seeds
from runtimes.inputs.request import Request
from runtimes.serving.engine.contract import Generated, PoolStatus
from runtimes.serving.engine.engine import Engine
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.state import dispatcher as module
from runtimes.serving.state.dispatcher import Dispatcher, Writing
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.order import Order
from runtimes.serving.state.result_cache import ResultCache
from runtimes.serving.state.retention import Retention
from runtimes.serving.state.store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    MOST_ATTEMPTS,
    QUEUED,
    RUNNING,
    FullError,
    StoredJob,
)
from runtimes.serving.state.written_images import written
from tests.serving.test_engine import pipeline, wait_for


@dataclasses.dataclass(frozen=True)
class Model:
    digest: str = "d" * 64


MODELS = {"m": Model()}


class HeldPool:
    """A pool whose tickets end when a test says so."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.refusals: list[Exception] = []
        self.options: list[dict[str, Any]] = []

    def submit(self, request: Request, model: str, **options: Any) -> Ticket:
        if self.refusals:
            raise self.refusals.pop()
        self.options.append(options)
        ticket = Ticket(request, model, on_cancel=lambda: self.end(ticket, CancelledError(0, 4)))
        self.tickets.append(ticket)
        return ticket

    def position(self, ticket: Ticket) -> int:
        return self.tickets.index(ticket)

    def status(self) -> PoolStatus:
        return PoolStatus()

    def close(self, *, drain: bool = True) -> None:
        pass

    def end(self, ticket: Ticket, error: Exception | None = None) -> None:
        ticket.end(None if error else Generated(
            [Image.new("RGB", (8, 8), (seed % 256, 0, 0)) for seed in seeds(ticket)], "d" * 64,
            (True,) * ticket.request.count), error)


def seeds(ticket: Ticket) -> tuple[int, ...]:
    return resolve_seeds(ticket.request.seed, ticket.request.count)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOOK_SECONDS": 0.02, "FULL_SECONDS": (0.02, 0.1), "BUSY_SECONDS": 0.02,
                        "END_SECONDS": 0.5}.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "state", reserve_bytes=0) as opened:
        yield opened


@pytest.fixture
def pool() -> HeldPool:
    return HeldPool()


def order(seed: int = 1, **fields: Any) -> Order:
    return Order.of("m", {"prompt": "a cat", "steps": 4, "seed": seed, **fields})


def accept(store: JobStore, seed: int = 1, *, files: dict[str, bytes] | None = None, model: str = "m",
           **options: Any) -> StoredJob:
    return store.accept(order(seed).to_json(), model=model, files=files, **options)


def ended(store: JobStore, *jobs: StoredJob) -> list[str]:
    wait_for(lambda: all(store.job(job.id).ended is not None for job in jobs))
    return [store.job(job.id).status for job in jobs]


def test_jobs_become_the_bytes_of_their_lone_run(store):
    jobs = [accept(store, seed) for seed in range(6)]
    with Engine({"m": pipeline()}) as engine, Dispatcher(store, engine, MODELS):
        assert ended(store, *jobs) == [COMPLETED] * 6
    for seed, job in enumerate(jobs):
        done = store.job(job.id)
        alone = Generated(pipeline()(order(seed).request()), done.result["digest"])
        (expected,) = written(alone, order(seed))
        assert store.image(done.images[0].sha256) == (expected.content, "png") and done.result["seeds"] == [seed]


def test_clients_files_reach_the_pool(store):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    edit = Order.of("m", {"prompt": "a cat", "steps": 4, "seed": 1, "strength": 0.5}, {"image": (file.getvalue(),)})
    (sha256,) = edit.to_json()["files"]["image"]
    job = store.accept(edit.to_json(), model="m", files={sha256: file.getvalue()})
    with Engine({"m": pipeline()}) as engine, Dispatcher(store, engine, MODELS):
        assert ended(store, job) == [COMPLETED]
    alone = Generated(pipeline()(edit.request()), store.job(job.id).result["digest"])
    assert store.image(store.job(job.id).images[0].sha256) == (written(alone, edit)[0].content, "png")


def test_no_more_jobs_are_claimed_than_keep_the_pool_busy_so_that_priorities_count(store, pool):
    first = [accept(store, seed) for seed in range(4)]
    with Dispatcher(store, pool, MODELS, writing=Writing(most_jobs=2)):
        wait_for(lambda: len(pool.tickets) == 2)
        urgent = accept(store, 9, priority=5)
        assert store.progress(urgent.id).position == 2 and store.progress(first[3].id).position == 4
        pool.end(pool.tickets[0])
        wait_for(lambda: len(pool.tickets) == 3)
        assert seeds(pool.tickets[2]) == (9,) and store.counts()[RUNNING] == 2
        assert pool.options[2]["priority"] == 5


def test_progress_and_previews_reach_whoever_waits_for_changes(store, pool):
    job = accept(store)
    with Dispatcher(store, pool, MODELS):
        wait_for(lambda: len(pool.tickets) == 1)
        (ticket,) = pool.tickets
        assert store.progress(job.id).status == QUEUED
        ticket.start()
        number = store.changes(-1, 0).number
        ticket.step(Progress(1, 4, np.full((2, 4, 6, 3), 200, np.uint8)))
        ticket.step(Progress(2, 4))
        wait_for(lambda: store.progress(job.id).step == 2)
        assert store.changes(number, 5).jobs == {job.id: RUNNING}
        seen = store.progress(job.id)
        assert (seen.status, seen.total, seen.preview_step) == (RUNNING, 4, 1) and seen.preview is not None
        assert Image.open(io.BytesIO(seen.preview)).size == (12, 4)
        pool.end(ticket)
        assert ended(store, job) == [COMPLETED] and store.progress(job.id).preview is None


def test_a_cancelled_job_ends_its_ticket_at_once(store, pool, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 30.0)  # heard, not looked for
    job = accept(store)
    with Dispatcher(store, pool, MODELS) as dispatcher:
        wait_for(lambda: len(pool.tickets) == 1)
        assert store.cancel(job.id)
        wait_for(lambda: pool.tickets[0].cancelled)
        wait_for(lambda: dispatcher.running == 0)
        assert store.job(job.id).status == CANCELLED
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
        accept(store, 2)  # wakes the threads


def test_reasons_of_the_pool_are_the_jobs_and_hold_no_path(store, pool):
    jobs = [accept(store, seed) for seed in range(3)]
    with Dispatcher(store, pool, MODELS):
        wait_for(lambda: len(pool.tickets) == 3)
        pool.end(pool.tickets[0], InputError("the height is 17", where="height", fix="give 16"))
        pool.end(pool.tickets[1], ZeroDivisionError("secret"))
        pool.end(pool.tickets[2], InputError("it is broken", where="/home/x/bundle"))
        assert ended(store, *jobs) == [FAILED] * 3
    assert [store.job(job.id).reason for job in jobs] == [
        "height: the height is 17 (give 16)", "a fault of the program: ZeroDivisionError", "it is broken"]


def test_a_job_of_a_model_that_is_not_served_any_more_fails_and_says_so(store, pool):
    job = store.accept(order().to_json(), model="gone")
    with Dispatcher(store, pool, MODELS):
        assert ended(store, job) == [FAILED]
    assert "'gone' is not served" in store.job(job.id).reason and pool.tickets == []


def test_a_job_whose_file_is_lost_or_changed_fails_and_says_so(store, pool):
    edit = Order.of("m", {"prompt": "", "seed": 1}, {"image": (png(),)})
    (sha256,) = edit.to_json()["files"]["image"]
    jobs = [store.accept(edit.to_json(), model="m", files={sha256: png()})]
    (store.folder / "inputs" / f"{sha256}.input").write_bytes(b"changed")
    with Dispatcher(store, pool, MODELS):
        assert ended(store, *jobs) == [FAILED]
    assert "changed on the disk" in store.job(jobs[0].id).reason


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return file.getvalue()


def test_what_may_pass_is_tried_three_times_and_then_fails_with_the_last_reason(store, pool):
    job = accept(store)
    with Dispatcher(store, pool, MODELS):
        for number in range(MOST_ATTEMPTS):
            wait_for(lambda number=number: len(pool.tickets) == number + 1)
            pool.end(pool.tickets[number], UnavailableError(f"no memory {number}"))
        assert ended(store, job) == [FAILED]
    assert store.job(job.id).reason == "no memory 2" and store.job(job.id).attempts == MOST_ATTEMPTS


def test_what_the_pool_has_tried_again_itself_fails_at_once(store, pool):
    job = accept(store)
    with Dispatcher(store, pool, MODELS):
        wait_for(lambda: len(pool.tickets) == 1)
        pool.tickets[0].restart()
        pool.end(pool.tickets[0], UnavailableError("two workers died with it"))
        assert ended(store, job) == [FAILED]


def test_a_full_queue_leaves_jobs_queued_and_costs_no_attempt(store, pool):
    pool.refusals = [QueueFullError(5, 0.01), UnavailableError("shutting down"), QueueFullError(5, 60.0)]
    job = accept(store)
    with Dispatcher(store, pool, MODELS):
        wait_for(lambda: len(pool.tickets) == 1)
        assert store.job(job.id).attempts == 1
        pool.end(pool.tickets[0])
        assert ended(store, job) == [COMPLETED]


def test_a_full_disk_puts_the_job_back_and_it_is_done_when_there_is_room(store, pool, monkeypatch):
    full, asked = [4], []
    complete, requeue = store.complete, store.requeue

    def refuses(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if full[0]:
                full[0] -= 1
                raise FullError("the disk is full")
            return method(*args, **options)
        return call

    monkeypatch.setattr(store, "complete", refuses(complete))
    monkeypatch.setattr(store, "requeue", refuses(requeue))
    job = accept(store)
    with Dispatcher(store, pool, MODELS, on_full=lambda: asked.append(1)):
        wait_for(lambda: len(pool.tickets) == 1)
        pool.end(pool.tickets[0])
        wait_for(lambda: len(pool.tickets) == 2)
        assert full == [0] and store.job(job.id).attempts == 1 and asked == [1]
        pool.end(pool.tickets[1])
        assert ended(store, job) == [COMPLETED]


def test_a_suspect_runs_alone_and_a_poison_job_fails_by_itself(tmp_path):
    """Twice the engine dies with all of them; then the one that kills it does so alone."""
    poison = 3

    def until_it_dies(store: JobStore) -> list[int]:
        """A dispatcher that dies as kill -9 does: nothing is put back. The seeds that ran at that moment."""
        held = HeldPool()
        dispatcher = Dispatcher(store, held, MODELS)
        running: list[Ticket] = []

        def settled() -> bool:
            running[:] = [ticket for ticket in held.tickets if not ticket.future.done()]
            counts = store.counts()
            return counts[RUNNING] == len(running) and (bool(running) or not counts[QUEUED])

        while not running or poison not in [seeds(ticket)[0] for ticket in running]:
            for ticket in running:
                held.end(ticket)
            wait_for(settled)
            if not running:
                break
        dispatcher._closing = True
        for thread in dispatcher._threads:
            thread.join()
        dispatcher._writers.shutdown()
        return [seeds(ticket)[0] for ticket in running]

    with JobStore(tmp_path, reserve_bytes=0) as store:
        jobs = [accept(store, seed) for seed in range(6)]
    seen = []
    for _ in range(4):
        with JobStore(tmp_path, reserve_bytes=0) as store:
            seen.append(until_it_dies(store))
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [3], []]
    with JobStore(tmp_path, reserve_bytes=0) as store:
        assert [store.job(job.id).status for job in jobs] == [COMPLETED] * 3 + [FAILED] + [COMPLETED] * 2
        assert "each time its engine died" in store.job(jobs[poison].id).reason


def test_stopping_finishes_what_runs_and_puts_back_what_waits(store, pool):
    jobs = [accept(store, seed) for seed in range(3)]
    dispatcher = Dispatcher(store, pool, MODELS)
    wait_for(lambda: len(pool.tickets) == 3)
    pool.tickets[0].start(), pool.tickets[1].start()
    stopping = threading.Thread(target=dispatcher.stop, args=(1.0,))
    stopping.start()
    wait_for(lambda: store.job(jobs[2].id).status == QUEUED)
    late = accept(store, 9)
    pool.end(pool.tickets[0])
    stopping.join(20)
    assert [store.job(job.id).status for job in (*jobs, late)] == [COMPLETED, QUEUED, QUEUED, QUEUED]
    assert [store.job(job.id).attempts for job in jobs] == [1, 0, 0] and dispatcher.running == 0


def test_a_pool_that_never_ends_a_ticket_does_not_hold_up_the_end(store, pool):
    job = accept(store)
    dispatcher = Dispatcher(store, pool, MODELS)
    wait_for(lambda: len(pool.tickets) == 1)
    pool.tickets[0].start()
    pool.tickets[0]._on_cancel = lambda: None
    dispatcher.stop(0.05)
    assert store.job(job.id).status == QUEUED
    pool.end(pool.tickets[0])
    assert store.job(job.id).status == QUEUED


def test_equal_jobs_are_generated_once_and_another_digest_is_another_key(store, pool):
    cache, models = ResultCache(1 << 20), {"m": Model()}
    first, second = accept(store, 5), None
    with Dispatcher(store, pool, models, cache=cache):
        wait_for(lambda: len(pool.tickets) == 1)
        pool.end(pool.tickets[0])
        assert ended(store, first) == [COMPLETED]
        second = accept(store, 5)
        assert ended(store, second) == [COMPLETED]
        assert store.job(second.id).images == store.job(first.id).images and store.job(second.id).result["cached"]
        models["m"] = Model("e" * 64)
        accept(store, 5)
        wait_for(lambda: len(pool.tickets) == 2)


def test_flagged_images_are_marked_in_the_result_and_replaced_by_policy(store, pool):
    job = accept(store)
    with Dispatcher(store, pool, MODELS, writing=Writing(safety="replace")):
        wait_for(lambda: len(pool.tickets) == 1)
        pool.end(pool.tickets[0])
        assert ended(store, job) == [COMPLETED]
    done = store.job(job.id)
    content, _ = store.image(done.images[0].sha256) or (b"", "")
    assert done.result["flagged"] == [True] and not np.asarray(Image.open(io.BytesIO(content))).any()


def test_a_store_that_fails_for_a_moment_stops_nothing(store, pool, monkeypatch, caplog):
    claim, faults = store.claim, [2]

    def fails(*args: Any, **options: Any) -> Any:
        if faults[0]:
            faults[0] -= 1
            raise OSError("the network is away")
        return claim(*args, **options)

    monkeypatch.setattr(store, "claim", fails)
    job = accept(store)
    with Dispatcher(store, pool, MODELS):
        wait_for(lambda: len(pool.tickets) == 1)
        pool.end(pool.tickets[0])
        assert ended(store, job) == [COMPLETED]
    assert "not claimed for a moment" in caplog.text


def test_ended_jobs_are_forgotten_in_the_background(tmp_path):
    now = [0.0]
    with JobStore(tmp_path, reserve_bytes=0, clock=lambda: now[0]) as store:
        job = accept(store)
        store.cancel(job.id)
        now[0] = 3601.0
        retention = Retention(store, hours=1, image_bytes=1 << 30, every_seconds=3600)
        wait_for(lambda: store.counts()[CANCELLED] == 0)
        second = accept(store)
        store.cancel(second.id)
        now[0] = 8000.0
        retention.look()
        wait_for(lambda: store.counts()[CANCELLED] == 0)
        retention.stop()
