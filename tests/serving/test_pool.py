"""The pool over real worker processes with numpy pipelines: shared, cancelled, killed, stopped, replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from runtimes.errors import CancelledError, InputError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.options import ServerOptions
from runtimes.serving.workers.connected_engine import WorkerOptions
from runtimes.serving.workers.link import choose
from runtimes.serving.workers.pool import Timing, WorkerPool
from tests.serving.tiny_bundles import copied, remark, tiny_bundle
from tests.serving.worker_pipelines import DEADLY, HANGING, fake

SLOW, QUICK = "tests.serving.worker_pipelines:slow", "tests.serving.worker_pipelines:quick"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("pool") / "m")


@pytest.fixture(scope="module")
def catalog(bundle) -> Catalog:
    return Catalog([bundle])


@contextmanager
def pool(catalog: Catalog, count: int = 1, pipelines: str = SLOW, batch: int = 8, **more) -> Iterator[WorkerPool]:
    """So many workers, whose pipelines are numpy's; "" runs the bundle itself."""
    workers = [WorkerOptions(f"cpu-{i}", threads=1, batch=batch, pipelines=pipelines, heartbeat_seconds=0.2)
               for i in range(count)]
    more.setdefault("timing", Timing(backoff_seconds=0.05, tick_seconds=0.05))
    one = WorkerPool(catalog, workers, reload_seconds=more.pop("reload_seconds", 0), **more)
    try:
        assert one.wait_until_ready(60)
        yield one
    finally:
        one.close(drain=False)


def request(text: str = "a cat", **fields) -> Request:
    return Request(text, **{"steps": 4, "seed": 3, "output": "numpy", **fields})


def lone(asked: Request) -> np.ndarray:
    return fake(0.0)(asked)


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def pids(one: WorkerPool) -> list[int]:
    return [local.process.pid for local in one._local if local.process is not None]


def test_images_are_those_of_one_process_with_steps_previews_and_what_belongs_to_them(catalog):
    with pool(catalog) as one:
        seen: list[Progress | None] = []
        ticket = one.submit(request(steps=6), "m", previews=2)
        ticket.watch(seen.append)
        result = ticket.result(30)
        np.testing.assert_array_equal(result.images, lone(request(steps=6)))
        assert result.digest == catalog["m"].digest and result.seconds > 0 and result.work_seconds > 0
        wait_for(lambda: seen and seen[-1] is None)
        steps = [event for event in seen if event is not None]
        assert [event.index for event in steps] == [1, 2, 3, 4, 5]
        shown = [event for event in steps if event.preview is not None]
        assert [event.index for event in shown] == [2, 4]
        assert all(event.preview is not None and event.preview.shape == (1, 8, 8, 3) for event in shown)
        [image] = one.submit(Request("a cat", steps=4, seed=3), "m").result(30).images
        np.testing.assert_array_equal(np.asarray(image), np.asarray(fake(0.0)(Request("a cat", steps=4, seed=3))[0]))
        assert ticket.status == "completed" and asyncio.run(awaited(one)).images.shape == (1, 32, 32, 3)
        # A ticket has ended a moment before its worker counts as free, and a worker says now and then what it holds.
        wait_for(lambda: one.status().running == 0 and one.status().workers[0].models == ("m",))
        wait_for(lambda: one.status().workers[0].memory_bytes > 10_000_000)
        assert one.status().workers[0].name == "cpu-0" and one.status().images_per_second > 0


async def awaited(one: WorkerPool):
    return await one.submit(request(), "m")


def test_requests_beside_each_other_share_calls_and_are_as_if_each_were_alone(catalog):
    with pool(catalog, 2) as one:
        requests = [request(steps=2 + n % 5, seed=n, images_per_prompt=1 + n % 2) for n in range(24)]
        tickets = [one.submit(asked, "m") for asked in requests]
        results = [ticket.result(60) for ticket in tickets]
        for asked, result in zip(requests, results, strict=True):
            np.testing.assert_array_equal(result.images, lone(asked))
        assert max(result.batch for result in results) > 1.5


def test_what_is_wrong_with_a_request_is_its_own_error(catalog):
    with pool(catalog) as one:
        with pytest.raises(InputError, match="no model 'x'"):
            one.submit(request(), "x")
        tickets = [one.submit(request(), "m"), one.submit(request(height=28), "m"),
                   one.submit(request(image="/nowhere.png"), "m"), one.submit(request(image=["no image"]), "m")]
        assert tickets[0].result(30).images.shape == (1, 32, 32, 3)
        for ticket, match in zip(tickets[1:], ("height", "no such image", "no such image"), strict=True):
            with pytest.raises(InputError, match=match):
                ticket.result(30)


def test_cancelling_ends_a_waiting_request_at_once_and_a_running_one_soon(catalog):
    with pool(catalog, batch=1) as one:
        running, waiting = one.submit(request(steps=500), "m"), one.submit(request(), "m")
        wait_for(lambda: running.progress is not None)
        assert one.position(waiting) == 0 and one.status().waiting == 1
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(0)
        running.cancel()
        with pytest.raises(CancelledError):
            running.result(10)
        assert running.status == waiting.status == "cancelled"
        assert one.submit(request(), "m").result(30).images.shape == (1, 32, 32, 3)


def test_a_full_queue_and_a_passed_deadline_say_so(catalog):
    with pool(catalog, batch=1, most_waiting=2) as one:
        first = one.submit(request(steps=500), "m")
        late = one.submit(request(), "m", deadline_seconds=0.2)
        one.submit(request(), "m")
        with pytest.raises(QueueFullError) as caught:
            one.submit(request(), "m")
        assert caught.value.retry_after >= 1
        with pytest.raises(UnavailableError, match="deadline"):
            late.result(10)
        first.cancel()


def test_closing_drains_what_was_accepted_or_ends_it_at_once(catalog):
    with pool(catalog) as one:
        tickets = [one.submit(request(seed=n), "m") for n in range(20)]
        processes = pids(one)
        one.close()
        assert all(ticket.status == "completed" for ticket in tickets)
        with pytest.raises(UnavailableError, match="shutting down"):
            one.submit(request(), "m")
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    with pool(catalog, batch=1) as one:
        tickets = [one.submit(request(steps=500), "m") for _ in range(3)]
        one.close(drain=False)
        for ticket in tickets:
            with pytest.raises(UnavailableError, match="shut down"):
                ticket.result(0)


def test_a_drain_can_be_cut_short(catalog):
    with pool(catalog, batch=1) as one:
        ticket = one.submit(request(steps=900), "m")
        drain = threading.Thread(target=one.close)
        drain.start()
        drain.join(0.3)
        assert drain.is_alive() and ticket.status == "running"
        one.close(drain=False)
        drain.join(20)
        assert not drain.is_alive() and ticket.status == "failed"


# ---- workers that die --------------------------------------------------------------------------------------------


def test_killing_workers_under_load_loses_no_request_and_changes_no_image(catalog):
    with pool(catalog, 2) as one:
        requests = [request(steps=10 + n % 7, seed=n) for n in range(40)]
        tickets = [one.submit(asked, "m") for asked in requests]
        for round_ in range(2):  # a third could meet a request that had met both
            time.sleep(0.3)
            os.kill(pids(one)[round_ % 2], signal.SIGKILL)
            wait_for(lambda: all(worker.alive for worker in one.status().workers))
        for asked, ticket in zip(requests, tickets, strict=True):
            np.testing.assert_array_equal(ticket.result(60).images, lone(asked))
        assert sum(worker.restarts for worker in one.status().workers) == 2


def test_a_request_that_kills_its_worker_fails_by_itself_and_takes_nobody_along(catalog):
    with pool(catalog) as one:
        deadly = one.submit(request(DEADLY, guidance_scale=1.0), "m")
        innocent = [one.submit(request(steps=8, seed=n), "m") for n in range(5)]
        with pytest.raises(UnavailableError, match="a worker died with it 3 times"):
            deadly.result(60)
        for n, ticket in enumerate(innocent):
            np.testing.assert_array_equal(ticket.result(60).images, lone(request(steps=8, seed=n)))
        assert one.status().workers[0].restarts == 3


def test_a_worker_that_says_nothing_any_more_is_ended_and_its_requests_run_again(catalog):
    timing = Timing(lost_seconds=1.5, backoff_seconds=0.05, tick_seconds=0.05)
    with pool(catalog, timing=timing) as one:
        ticket = one.submit(request(steps=100), "m")
        wait_for(lambda: ticket.progress is not None)
        os.kill(pids(one)[0], signal.SIGSTOP)
        np.testing.assert_array_equal(ticket.result(60).images, lone(request(steps=100)))
        assert one.status().workers[0].restarts == 1 and ticket.attempts == 1


def test_a_call_that_never_returns_ends_its_worker(catalog):
    timing = Timing(lost_seconds=1.0, backoff_seconds=0.05, tick_seconds=0.05)
    with pool(catalog, timing=timing) as one:
        with pytest.raises(UnavailableError, match="3 times"):
            one.submit(request(HANGING, guidance_scale=1.0), "m").result(60)


def test_a_worker_that_never_starts_is_tried_again_less_and_less_often(catalog):
    timing = Timing(backoff_seconds=0.1, tick_seconds=0.02)
    one = WorkerPool(catalog, [WorkerOptions("cpu-0", pipelines="no.such.module:x")], reload_seconds=0, timing=timing)
    try:
        assert not one.wait_until_ready(1.0)
        ticket = one.submit(request(), "m", deadline_seconds=0.1)
        with pytest.raises(UnavailableError, match="deadline"):
            ticket.result(10)
        assert not one.status().workers[0].alive
    finally:
        one.close(drain=False)


def test_workers_end_with_a_server_that_was_killed(bundle, tmp_path):
    code = f"""
import sys, time
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.workers.connected_engine import WorkerOptions
from runtimes.serving.workers.pool import WorkerPool
from runtimes.inputs.request import Request
pool = WorkerPool(Catalog([{str(bundle)!r}]), [WorkerOptions("cpu-0", threads=1, pipelines={SLOW!r})])
assert pool.wait_until_ready(60)
pool.submit(Request("a cat", steps=900), "m")
print(*[local.process.pid for local in pool._local], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        worker = int(server.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        server.kill()
        wait_for(lambda: not Path(f"/proc/{worker}").exists() or is_zombie(worker), 20)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---- bundles -----------------------------------------------------------------------------------------------------


def test_a_real_bundle_is_replaced_under_load_without_a_failed_request(bundle, tmp_path):
    folder = copied(bundle, tmp_path / "m")
    catalog = Catalog([folder])
    with pool(catalog, 1, pipelines="", reload_seconds=0.1) as one:
        before = catalog["m"].digest
        tickets = [one.submit(request(seed=0), "m")]
        tickets[0].result(60)
        for n in range(1, 41):
            tickets.append(one.submit(request(seed=n % 4), "m"))
            if n == 15:
                after = remark(folder, "second")
            time.sleep(0.02)
        results = [ticket.result(60) for ticket in tickets]
        assert {result.digest for result in results} == {before, after} and results[-1].digest == after
        for n, result in enumerate(results):
            np.testing.assert_array_equal(result.images, results[n % 4].images)


def test_the_options_of_serve_make_a_pool(catalog, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_bytes(b"a key that nobody else has")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ServerOptions(workers=1, queue=7, engine_port=port, engine_key_file=str(key_file), memory="1GB")
    one = WorkerPool.of(catalog, options)
    try:
        assert one.listener is not None and one.listener.port == port
        with pytest.raises(UnavailableError, match="cannot listen"):
            WorkerPool.of(catalog, options)
        assert one.submit(request(), "m").result(60).images.shape == (1, 32, 32, 3)
    finally:
        one.close()


# ---- which worker ------------------------------------------------------------------------------------------------


class FakeLink:
    """What `choose` looks at."""

    def __init__(self, loaded=(), running=(), capacity=8, digest="d") -> None:
        self.ready, self.loaded, self.capacity, self.digests = True, loaded, capacity, {"m": digest}
        self.running = {ticket.number: ticket for ticket in running}

    images = property(lambda self: sum(ticket.images for ticket in self.running.values()))

    def has_room(self, ticket) -> bool:
        return self.images + ticket.images <= self.capacity


def test_a_request_goes_where_its_bundle_is_loaded_then_where_it_is_idle_then_where_its_size_runs():
    small, large = Ticket(request(), "m"), Ticket(request(height=64), "m")
    idle, other = FakeLink(("m",)), FakeLink()
    same, different = FakeLink(("m",), [small, small, Ticket(request(), "m")]), FakeLink(("m",), [large])
    full, wrong = FakeLink(("m",), [small], capacity=1), FakeLink(("m",), digest="another")

    def chosen(*links):
        return choose(Ticket(request(), "m"), "d", links)

    assert chosen(other, different, same, idle) is idle
    assert chosen(other, different, same) is same and chosen(other, different) is different
    assert chosen(full, other) is other and chosen(full, wrong) is None
