"""The engine over a pipeline of numpy functions: requests of any length beside each other, each as if it were alone."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest

from runtimes.errors import CancelledError, InputError, ParityError, UnavailableError
from runtimes.inputs.request import Request
from runtimes.pipeline.diffusion import Pipeline
from runtimes.serving.engine.engine import Engine, preview_steps
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import AGING_SECONDS, QueueFullError, Waiting
from tests.runtimes.fakes import DDIM, FACTS, FakeSession, fake_sessions, tokenize


def pipeline(slow: float = 0.0, refused: str = "") -> Pipeline:
    """Numpy functions; the denoiser takes `slow` seconds more, and raises where a row is of the prompt `refused`."""
    sessions = fake_sessions(batch=16)
    unet = sessions["unet"].function

    def slowed(**feeds):
        time.sleep(slow)
        if refused and (feeds["encoder_hidden_states"][:, 0, 0] == np.sin(np.float32(len(refused)))).any():
            raise UnavailableError("the device refuses", where="unet")
        return unet(**feeds)

    sessions["unet"].function = slowed
    return Pipeline(sessions, FACTS, DDIM, tokenize)


def request(text: str = "a cat", **fields) -> Request:
    return Request(text, **{"steps": 4, "seed": 3, "output": "numpy", **fields})


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_requests_of_any_length_scheduler_and_guidance_are_as_if_each_were_alone():
    requests = [request(f"cat {n}", steps=2 + n, seed=n, scheduler=("ddim", "euler", "heun", "dpm++")[n % 4],
                        guidance_scale=float(n % 3), images_per_prompt=1 + n % 2) for n in range(12)]
    alone = [pipeline()(r) for r in requests]
    with Engine({"m": pipeline()}) as engine:
        tickets = [engine.submit(r, "m") for r in requests]
        for ticket, expected in zip(tickets, alone, strict=True):
            np.testing.assert_array_equal(ticket.result(30).images, expected)
            assert ticket.status == "completed"


def test_a_short_request_overtakes_a_long_one_that_began_before():
    with Engine({"m": pipeline(0.005)}) as engine:
        long = engine.submit(request(steps=60), "m")
        wait_for(lambda: long.progress is not None and long.progress.index > 3)
        short = engine.submit(request(steps=2), "m")
        short.result(30)
        assert long.status == "running" and long.result(30).images.shape == (1, 32, 32, 3)


def test_a_fault_of_one_never_ends_another():
    broken = pipeline()
    with Engine({"m": broken, "other": pipeline()}) as engine:
        nan = np.full((1, 2, 8, 8), 3e38, np.float32)
        tickets = [engine.submit(request(), "m"), engine.submit(request(latents=nan, guidance_scale=1e30), "m"),
                   engine.submit(request("x", height=28), "m"), engine.submit(request(), "other")]
        good, overflowing, unfit, other = tickets
        assert good.result(30).images.shape == other.result(30).images.shape
        with pytest.raises(ParityError, match="not finite"):
            overflowing.result(30)
        with pytest.raises(InputError, match="height"):
            unfit.result(30)
        assert [t.status for t in tickets] == ["completed", "failed", "failed", "completed"]


def test_what_one_request_breaks_in_a_shared_call_is_that_requests_error_alone():
    with Engine({"m": pipeline(0.002, "bad")}) as engine:
        tickets = [engine.submit(request(text, guidance_scale=1.0, steps=9), "m") for text in ("good", "bad", "fine.")]
        assert tickets[0].result(30).images.shape == tickets[2].result(30).images.shape
        with pytest.raises(UnavailableError, match="refuses"):
            tickets[1].result(30)


def test_what_one_requests_latents_break_in_the_decoder_is_that_requests_error_alone():
    chosen = pipeline()
    decoder = chosen.sessions["vae_decoder"]
    assert isinstance(decoder, FakeSession)
    plain = decoder.function

    def refuses_company(latent_sample):
        if len(latent_sample) > 1:
            raise UnavailableError("the device refuses", where="vae_decoder")
        return plain(latent_sample)

    decoder.function = refuses_company
    jobs = chosen.prepare([request("one"), request("two")])
    while not all(job.done for job in jobs):
        chosen.advance(jobs)
    alone = [pipeline()(request("one")), pipeline()(request("two"))]
    np.testing.assert_array_equal(chosen.finish(jobs), alone)


def test_cancelling_ends_a_waiting_request_at_once_and_a_running_one_at_its_next_step():
    with Engine({"m": pipeline(0.005)}, most_images=1) as engine:
        running, waiting = engine.submit(request(steps=200), "m"), engine.submit(request(), "m")
        wait_for(lambda: running.progress is not None)
        waiting.cancel()
        with pytest.raises(CancelledError):
            waiting.result(5)
        running.cancel()
        with pytest.raises(CancelledError) as caught:
            running.result(5)
        assert 0 < caught.value.steps_taken < 200 and running.status == waiting.status == "cancelled"


def test_a_full_queue_is_refused_with_the_time_to_come_again_and_an_unknown_model_by_name():
    with Engine({"m": pipeline(0.01)}, most_waiting=2, most_images=1) as engine:
        first = engine.submit(request(steps=100), "m")
        wait_for(lambda: first.status == "running")
        engine.submit(request(), "m"), engine.submit(request(), "m")
        with pytest.raises(QueueFullError) as caught:
            engine.submit(request(), "m")
        assert caught.value.retry_after >= 1
        with pytest.raises(InputError, match="no model 'x'"):
            engine.submit(request(), "x")
        first.cancel()


def test_a_deadline_that_passes_in_the_queue_is_a_failure_that_says_so():
    with Engine({"m": pipeline(0.01)}, most_images=1) as engine:
        first = engine.submit(request(steps=100), "m")
        wait_for(lambda: first.status == "running")
        late = engine.submit(request(), "m", deadline_seconds=0.05)
        with pytest.raises(UnavailableError, match="deadline"):
            late.result(5)
        first.cancel()


def test_closing_drains_what_was_accepted_or_ends_it_at_once():
    engine = Engine({"m": pipeline(0.001)})
    tickets = [engine.submit(request(), "m") for _ in range(10)]
    engine.close()
    assert all(t.status == "completed" for t in tickets)
    with pytest.raises(UnavailableError, match="shutting down"):
        engine.submit(request(), "m")
    engine = Engine({"m": pipeline(0.01)}, most_images=1)
    tickets = [engine.submit(request(steps=100), "m") for _ in range(3)]
    engine.close(drain=False)
    for ticket in tickets:
        with pytest.raises(UnavailableError, match="shut down"):
            ticket.result(5)


def test_a_request_of_more_images_than_the_engine_has_room_for_runs_by_itself():
    with Engine({"m": pipeline()}, most_images=2) as engine:
        tickets = [engine.submit(request(images_per_prompt=n), "m") for n in (1, 5, 1)]
        assert [len(t.result(30).images) for t in tickets] == [1, 5, 1]


def test_progress_is_every_step_and_previews_are_where_they_were_asked_for():
    seen: list[Progress | None] = []
    with Engine({"m": pipeline(0.002)}) as engine:
        held = engine.submit(request(steps=30), "m")
        ticket = engine.submit(request(steps=8), "m", previews=3)
        ticket.watch(seen.append)
        ticket.result(30), held.result(30)
    wait_for(lambda: seen[-1] is None)
    steps = [event for event in seen if event is not None]
    assert [event.index for event in steps] == list(range(1, 8))
    shown = {event.index for event in steps if event.preview is not None}
    assert shown == {2, 4, 6} and steps[3].total == 8


def test_who_watches_late_is_given_the_steps_so_far():
    with Engine({"m": pipeline()}) as engine:
        ticket = engine.submit(request(steps=8), "m", previews=2)
        ticket.result(30)
    seen: list[Progress | None] = []
    ticket.watch(seen.append)
    assert [event and event.index for event in seen] == [1, 2, 3, 4, 5, 6, 7, None]
    assert [event.index for event in seen if event is not None and event.preview is not None] == [2, 5]


@pytest.mark.parametrize(("count", "steps", "expected"), [
    (0, 10, set()), (1, 10, {5}), (3, 4, {1, 2, 3}), (3, 2, {1}), (2, 1, set()), (3, 25, {6, 12, 18}),
])
def test_previews_are_spread_over_the_steps_and_never_show_the_last(count, steps, expected):
    assert preview_steps(count, steps) == expected


def test_tickets_are_awaitable_and_their_events_end_with_them():
    async def ask(engine: Engine) -> tuple[int, int]:
        tickets = [engine.submit(request(steps=6, seed=n), "m") for n in range(4)]
        events = [event.index async for event in tickets[0].events()]
        results = await asyncio.gather(*tickets)
        return len(events), sum(len(result.images) for result in results)

    with Engine({"m": pipeline(0.002)}) as engine:
        events, images = asyncio.run(ask(engine))
    assert events == 5 and images == 4


def test_seeds_are_resolved_when_a_request_is_accepted_so_that_it_can_run_again():
    with Engine({"m": pipeline()}) as engine:
        ticket = engine.submit(request(seed=None), "m")
        again = engine.submit(ticket.request, "m")
        np.testing.assert_array_equal(ticket.result(30).images, again.result(30).images)


def test_many_threads_submit_and_cancel():
    with Engine({"m": pipeline()}, most_waiting=500) as engine:
        ended: list[str] = []

        def client(number: int) -> None:
            for i in range(15):
                ticket = engine.submit(request(steps=1 + (number + i) % 5, seed=i), "m")
                if i % 5 == 4:
                    ticket.cancel()
                try:
                    ticket.result(30)
                except CancelledError:
                    pass
                ended.append(ticket.status)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(ended) == 120 and set(ended) <= {"completed", "cancelled"} and ended.count("completed") >= 96
        assert engine.running == 0 and len(engine.waiting) == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_waiting_raises_a_priority_so_that_nobody_starves():
    clock = Clock()
    queue = Waiting(100, clock)
    old = Ticket(request(), "m")
    old.created = 0.0
    queue.put(old)
    for second in range(1, 60):
        clock.now = float(second)
        urgent = Ticket(request(), "m", priority=3)
        urgent.created = clock.now
        queue.put(urgent)
        taken = queue.take({"m"}, 1)
        if taken == [old]:
            break
    assert 3 * AGING_SECONDS <= clock.now <= 3 * AGING_SECONDS + 2


def test_a_large_request_is_not_overtaken_for_ever_and_other_models_are_left_alone():
    queue = Waiting(10)
    large, small = Ticket(dataclasses.replace(request(), images_per_prompt=4), "m"), Ticket(request(), "m")
    other = Ticket(request(), "other")
    for ticket in (large, small, other):
        queue.put(ticket)
    assert queue.take({"m"}, 3) == [] and queue.take({"m"}, 5) == [large, small] and len(queue) == 1
    assert queue.position(other) == 0
