"""`RayPool` over replicas that are functions: what is retried, ordered, cancelled and drained. No Ray is started."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from runtimes.errors import CancelledError, DeployError, InputError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.serving.cluster.cluster_settings import ClusterSettings
from runtimes.serving.cluster.engine_replica import Call, Message
from runtimes.serving.cluster.ray_pool import MOST_ATTEMPTS, RayPool
from runtimes.serving.engine.contract import Generated
from runtimes.serving.engine.ticket import Progress
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.store import Store


class ReplicaDied(Exception):
    """As Ray says it."""


class Replicas:
    """Calls in the order of their arrival; each does what `behave` says."""

    def __init__(self, behave: Callable[[Replicas, Call], AsyncIterator[Message]]) -> None:
        self.calls: list[Call] = []
        self.closed: list[Call] = []
        self.go = threading.Event()
        self._behave = behave

    async def __call__(self, call: Call) -> AsyncIterator[Message]:
        self.calls.append(call)
        try:
            async for message in self._behave(self, call):
                yield message
        finally:
            self.closed.append(call)


async def good(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    yield Progress(1, 2)
    yield Progress(2, 2)
    yield Generated(["image"], "digest")


async def waits(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    yield Progress(1, 9)
    while not replicas.go.is_set():
        await asyncio.sleep(0.005)
    yield Generated([call.request.prompt], "digest")


async def dies_once(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    yield Progress(1, 2)
    if len(replicas.calls) == 1:
        raise ReplicaDied
    yield Generated(["image"], "digest")


async def dies(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    raise ReplicaDied
    yield


async def refuses(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    yield InputError("height is 13", where="height")


async def breaks(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    raise ZeroDivisionError
    yield


async def falls_silent(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
    yield Progress(1, 2)


@pytest.fixture
def made() -> Any:
    pools: list[RayPool] = []

    def make(behave: Callable[[Replicas, Call], AsyncIterator[Message]], **options: Any) -> tuple[RayPool, Replicas]:
        replicas = Replicas(behave)
        pools.append(RayPool(replicas, {"m": None}, lost=(ReplicaDied,), **options))
        return pools[-1], replicas

    yield make
    for pool in pools:
        pool.close(drain=False)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def request(prompt: str = "a cat") -> Request:
    return Request(prompt, steps=9)


def test_steps_and_images_come_from_a_replica_with_seeds_resolved_here(made):
    pool, replicas = made(good)
    ticket = pool.submit(request(), "m", priority=3, previews=2, judge=True)
    assert ticket.result(10).images == ["image"] and ticket.progress == Progress(2, 2)
    call = replicas.calls[0]
    assert (call.model, call.priority, call.previews, call.judge) == ("m", 3, 2, True)
    assert call.request.seed == ticket.request.seed and len(call.request.seed) == 1
    assert ticket.status == "completed" and pool.status().running == 0


def test_a_request_whose_replica_dies_runs_again_with_the_same_seed(made):
    pool, replicas = made(dies_once)
    assert pool.submit(request(), "m").result(10).images == ["image"]
    assert len(replicas.calls) == 2 and replicas.calls[0].request.seed == replicas.calls[1].request.seed


def test_a_request_that_ends_every_replica_is_given_up(made):
    pool, replicas = made(dies)
    with pytest.raises(UnavailableError, match="3 engines ended"):
        pool.submit(request(), "m").result(20)
    assert len(replicas.calls) == MOST_ATTEMPTS


@pytest.mark.parametrize(("behave", "error", "what"), [
    (refuses, InputError, "height is 13"), (breaks, DeployError, "fault of the program: ZeroDivisionError"),
    (falls_silent, DeployError, "without a word")])
def test_errors_of_a_request_are_not_tried_again(made, behave, error, what):
    pool, replicas = made(behave)
    with pytest.raises(error, match=what):
        pool.submit(request(), "m").result(10)
    assert len(replicas.calls) == 1


def test_what_is_not_sent_waits_in_the_order_of_priorities(made):
    pool, replicas = made(waits, most_sent=1)
    first = pool.submit(request("first"), "m")
    until(lambda: replicas.calls)
    low, high = pool.submit(request("low"), "m"), pool.submit(request("high"), "m", priority=5)
    assert [pool.position(ticket) for ticket in (first, high, low)] == [0, 0, 1]
    assert (pool.status().waiting, pool.status().running) in ((2, 1), (3, 0))
    replicas.go.set()
    assert [ticket.result(10).images for ticket in (first, low, high)] == [["first"], ["low"], ["high"]]
    assert [call.request.prompt for call in replicas.calls] == ["first", "high", "low"]


def test_a_cancelled_request_is_cancelled_on_its_replica(made):
    pool, replicas = made(waits, most_sent=1)
    running = pool.submit(request(), "m")
    until(lambda: running.progress)
    waiting = pool.submit(request(), "m")
    waiting.cancel()
    running.cancel()
    for ticket in (running, waiting):
        with pytest.raises(CancelledError):
            ticket.result(10)
    assert replicas.closed == replicas.calls and len(replicas.calls) == 1


def test_a_request_that_is_cancelled_at_once_ends(made):
    pool, _ = made(waits)
    for _ in range(50):
        ticket = pool.submit(request(), "m")
        ticket.cancel()
        with pytest.raises(CancelledError):
            ticket.result(10)
    until(lambda: pool.status().running == pool.status().waiting == 0)


def test_the_queue_is_bounded_deadlines_hold_and_unknown_models_are_refused(made):
    pool, replicas = made(waits, most_sent=1, most_waiting=2)
    first = pool.submit(request(), "m")
    until(lambda: replicas.calls)
    late = pool.submit(request(), "m", deadline_seconds=0.0)
    with pytest.raises(UnavailableError, match="deadline"):
        late.result(10)
    pool.submit(request(), "m")
    pool.submit(request(), "m")
    with pytest.raises(QueueFullError):
        pool.submit(request(), "m")
    with pytest.raises(InputError, match="no model 'other'"):
        pool.submit(request(), "other")
    replicas.go.set()
    first.result(10)


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_more(made):
    pool, replicas = made(waits, most_sent=1)
    tickets = [pool.submit(request(str(n)), "m") for n in range(3)]
    threading.Timer(0.1, replicas.go.set).start()
    pool.close()
    assert [ticket.result(0).images for ticket in tickets] == [["0"], ["1"], ["2"]]
    with pytest.raises(UnavailableError, match="shutting down"):
        pool.submit(request(), "m")


def test_a_close_without_drain_ends_everything_at_once(made):
    pool, _ = made(waits, most_sent=1)
    tickets = [pool.submit(request(), "m") for _ in range(3)]
    pool.close(drain=False)
    for ticket in tickets:
        with pytest.raises(UnavailableError, match="shutting down"):
            ticket.result(0)


def test_arrays_can_be_written_to(made):
    shared = np.zeros((1, 4, 4, 3), np.float32)
    shared.flags.writeable = False

    async def arrays(replicas: Replicas, call: Call) -> AsyncIterator[Message]:
        yield Generated(shared, "digest")

    pool, _ = made(arrays)
    assert pool.submit(request(), "m").result(10).images.flags.writeable


def test_a_front_can_ask_the_state_service_for_all_of_a_store():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        from runtimes.serving.cluster.state_service import CALLS, RemoteStore
    for name in CALLS:
        assert list(inspect.signature(getattr(RemoteStore, name)).parameters) == list(
            inspect.signature(getattr(Store, name)).parameters), name
    assert {"accept", "claim", "complete", "changes"} <= CALLS


def test_settings_go_to_json_and_back_and_unknown_keys_are_refused():
    settings = ClusterSettings(ServerOptions(replicas="2:5", cors=("https://a.example",)), fronts=2, engine_cpus=0.5)
    assert ClusterSettings.from_json(settings.to_json()) == settings
    assert (settings.least, settings.most, settings.engine_room) == (2, 5, 16)
    with pytest.raises(InputError, match="engine_cpu, sate"):
        ClusterSettings.from_json({"engine_cpu": 1, "server": {"sate": "/state"}})
    for broken in ("5:2", "0:1", "many", "1:2:3", "-1:2"):
        with pytest.raises(InputError) as caught:
            dataclasses.replace(settings, server=ServerOptions(replicas=broken))
        assert caught.value.where == "--replicas"
