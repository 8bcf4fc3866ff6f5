"""The engine under random arrivals, cancels, deadlines and faults: each ticket ends once, with the image of its lone
run or with its own error; and turns are fair."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest

from runtimes.errors import CancelledError, DeployError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.pipeline.diffusion import Pipeline
from runtimes.serving.engine.engine import Engine
from runtimes.serving.engine.lanes import Lanes
from runtimes.serving.engine.ticket import Ticket
from runtimes.serving.engine.waiting import Waiting
from tests.runtimes.fakes import calls_of
from tests.serving.test_engine import pipeline, request, wait_for

BAD = "bad word"


class Faulty(Pipeline):
    """A pipeline with bugs: now and then a method raises what is no error of ours."""

    chance: random.Random
    faults: float = 0.0

    def advance(self, jobs):
        self._fault("advance")
        super().advance(jobs)

    def prepare(self, requests, **more):
        self._fault("prepare")
        return super().prepare(requests, **more)

    def finish(self, jobs):
        self._fault("finish")
        return super().finish(jobs)

    def preview(self, latents):
        self._fault("preview")
        return super().preview(latents)

    def _fault(self, name: str) -> None:
        if self.chance.random() < self.faults:
            raise RuntimeError(f"a bug in {name}")


def faulty(seed: int, faults: float, refused: str = "") -> Faulty:
    made = pipeline(0.0, refused)
    made.__class__ = Faulty
    assert isinstance(made, Faulty)
    made.chance, made.faults = random.Random(seed), faults
    return made


def some_request(chance: random.Random) -> Request:
    return request(BAD if chance.random() < 0.05 else "x" * chance.randint(1, 5), steps=chance.randint(1, 9),
                   seed=chance.randrange(100), images_per_prompt=chance.choice((1, 1, 1, 2)),
                   height=chance.choice((32, 32, 64)), guidance_scale=chance.choice((1.0, 4.0)),
                   scheduler=chance.choice((None, "euler", "heun", "dpm++")))


class Ends:
    """Counts how often each ticket ends."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self._lock = threading.Lock()

    def watch(self, ticket: Ticket) -> None:
        def seen(event) -> None:
            if event is None:
                with self._lock:
                    self.counts[ticket.number] += 1

        ticket.watch(seen)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_each_ticket_ends_once_with_the_image_of_its_lone_run_or_an_error_of_its_own(seed):
    chance, ends = random.Random(seed), Ends()
    faults = 0.0 if seed < 3 else 0.03
    models = {"a": faulty(seed, faults, BAD), "b": faulty(seed + 100, faults)}
    tickets: list[tuple[Ticket, Request]] = []
    with Engine(models, most_waiting=1000, most_images=chance.choice((2, 8)),
                company_seconds=chance.choice((0.0, 0.01))) as engine:
        for _ in range(80):
            asked, model = some_request(chance), chance.choice("ab")
            ticket = engine.submit(asked, model, priority=chance.randint(0, 2), previews=chance.randint(0, 3),
                                   deadline_seconds=chance.choice((None, None, None, 0.02)))
            ends.watch(ticket)
            tickets.append((ticket, asked))
            if chance.random() < 0.15:
                chance.choice(tickets)[0].cancel()
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.01)
    assert {ends.counts[ticket.number] for ticket, _ in tickets} == {1} and engine.running == len(engine.waiting) == 0
    outcomes = Counter(check(ticket, asked) for ticket, asked in tickets)
    assert outcomes["image"] > 20 and (faults or not outcomes["bug"])
    assert all(loaded.users == 0 for loaded in engine.models.loaded())


def check(ticket: Ticket, asked: Request) -> str:
    """What became of a ticket; fails if it is nothing that may."""
    error = ticket.future.exception()
    if error is None:
        np.testing.assert_array_equal(ticket.result().images, pipeline()(asked))
        return "image"
    if isinstance(error, CancelledError):
        assert ticket.cancelled
        return "cancelled"
    if isinstance(error, UnavailableError):
        assert ticket.deadline is not None if "deadline" in str(error) else asked.prompt == BAD
        return "deadline or refused"
    assert type(error) is DeployError and "RuntimeError" in str(error)
    return "bug"


def test_a_bug_in_a_step_ends_what_shared_it_and_the_engine_goes_on():
    broken = faulty(0, 1.0)
    with Engine({"m": broken}) as engine:
        broken.faults = 0.0
        first = engine.submit(request(steps=300), "m")
        wait_for(lambda: first.progress is not None)
        broken.faults = 1.0
        with pytest.raises(DeployError, match="a fault of the program: RuntimeError"):
            first.result(20)
        broken.faults = 0.0
        assert engine.submit(request(), "m").result(20).images.shape == (1, 32, 32, 3)


def test_a_bug_of_the_engine_itself_ends_what_it_may_concern_and_the_engine_goes_on(monkeypatch):
    with Engine({"m": pipeline(0.001)}) as engine:
        running = engine.submit(request(steps=500), "m")
        wait_for(lambda: running.progress is not None)

        whole, raised = Lanes.next, list[bool]()

        def broken(self):
            if not raised:
                raised.append(True)
                raise ZeroDivisionError
            return whole(self)

        monkeypatch.setattr(Lanes, "next", broken)
        with pytest.raises(DeployError, match="ZeroDivisionError"):
            running.result(20)
        assert engine.submit(request(), "m").result(20).images.shape == (1, 32, 32, 3)


def test_a_watcher_that_raises_is_no_matter_of_the_engine():
    def broken(event):
        raise RuntimeError("its loop is closed")

    with Engine({"m": pipeline(0.001)}) as engine:
        ticket = engine.submit(request(steps=20), "m")
        ticket.watch(broken)
        assert ticket.result(20).images.shape == (1, 32, 32, 3)


def test_simultaneous_requests_share_every_call_and_are_encoded_and_decoded_together():
    one = pipeline()
    with Engine({"m": one}, company_seconds=5.0, most_images=4) as engine:
        tickets = [engine.submit(request("x" * (n + 1), seed=n, guidance_scale=1.0), "m") for n in range(4)]
        assert [ticket.result(20).batch for ticket in tickets] == [4.0] * 4
    assert [len(call["sample"]) for call in calls_of(one, "unet")] == [4] * 4
    assert [len(call["latent_sample"]) for call in calls_of(one, "vae_decoder")] == [4]


def test_requests_that_come_one_by_one_wait_for_no_company(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(Waiting, "wait_for_images", lambda self, images, seconds: waits.append(seconds))
    with Engine({"m": pipeline()}, company_seconds=0.25) as engine:
        for _ in range(3):
            assert engine.submit(request(), "m").result(20).batch == 1.0
        assert waits == [0.25]  # whether any comes is not known at first
        both = [engine.submit(request(steps=200), "m") for _ in range(2)]
        assert [ticket.result(20).images.shape for ticket in both] == [(1, 32, 32, 3)] * 2
        engine.submit(request(), "m").result(20)
        assert waits == [0.25, 0.25]


def test_a_model_of_slow_steps_does_not_hold_up_a_quick_one():
    """Each gets half of the time: the quick one takes many steps for one of the slow one."""
    with Engine({"slow": pipeline(0.05), "quick": pipeline(0.001)}) as engine:
        slow = engine.submit(request(steps=60), "slow")
        wait_for(lambda: slow.progress is not None)
        quick = engine.submit(request(steps=60), "quick")
        quick.result(30)
        assert slow.progress is not None and slow.progress.index < 40
        slow.cancel()


def test_the_judgement_of_a_bundles_safety_checker_comes_with_the_images():
    class Judging(Pipeline):
        judges = True

        def flagged(self, images):
            return [i == 1 for i, _ in enumerate(images)]

    judging = pipeline()
    judging.__class__ = Judging
    with Engine({"m": judging, "plain": pipeline()}) as engine:
        both = request(images_per_prompt=2)
        assert engine.submit(both, "m", judge=True).result(20).flagged == (False, True)
        assert engine.submit(both, "m").result(20).flagged == ()
        assert engine.submit(both, "plain", judge=True).result(20).flagged == ()
        latents = request(output="latents")
        assert engine.submit(latents, "m", judge=True).result(20).flagged == ()


def test_an_image_that_cannot_be_judged_is_not_given_out():
    class Broken(Pipeline):
        judges = True

        def flagged(self, images):
            raise UnavailableError("out of memory", where="safety_checker")

    broken = pipeline()
    broken.__class__ = Broken
    with Engine({"m": broken}) as engine, pytest.raises(UnavailableError, match="out of memory"):
        engine.submit(request(), "m", judge=True).result(20)
