"""The engine: a queue, and a worker that advances all requests that fit beside each other, one step at a time.

    with Engine({"emoji": runtimes.load("build/reference-onnxruntime-fp32")}) as engine:
        tickets = [engine.submit(Request("a red apple", steps=n), "emoji") for n in (4, 10, 25)]
        images = [ticket.result() for ticket in tickets]          # or: await ticket

A request joins at any step and leaves when it is done: short ones are not held up by long ones. What it gives does not
depend on its company (`Pipeline.advance`). One thread owns the pipelines; nothing here knows HTTP or disks.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.errors import CancelledError, InputError, UnavailableError
from runtimes.inputs.noise import resolve_seeds
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import Waiting

if TYPE_CHECKING:
    from runtimes.inputs.request import Request
    from runtimes.pipeline.job import Job

MOST_WAITING, MOST_IMAGES = 256, 8
IDLE_SECONDS = 0.5


class Steppable(Protocol):
    """What the engine asks of a pipeline: `runtimes.Pipeline` is one."""

    def prepare(self, requests: list[Request]) -> list[Job]:
        """Requests as jobs."""

    def advance(self, jobs: list[Job]) -> None:
        """One step of each."""

    def finish(self, jobs: list[Job]) -> list[Any]:
        """Their images."""

    def preview(self, latents: Any) -> Any:
        """Latents as small images: (B, C, H/f, W/f) float32 to (B, H/f, W/f, 3) uint8."""


class Engine:
    """Requests in, tickets out. Any thread may submit; a context manager that drains at its end."""

    def __init__(self, models: Mapping[str, Steppable], *, most_waiting: int = MOST_WAITING,
                 most_images: int = MOST_IMAGES, watch: Callable[[str, float], None] = lambda name, value: None,
                 ) -> None:
        """Start the worker.

        Args:
            models: pipelines by the name that requests give.
            most_waiting: requests in the queue; more are refused.
            most_images: images that are denoised side by side.
            watch: receives figures by name: "batch" images of a round, "wait", "service" and "round" in seconds.
        """
        self.models = dict(models)
        self.waiting = Waiting(most_waiting)
        self._most, self._watch = most_images, watch
        self._running: list[tuple[Ticket, Job]] = []
        self._stopping, self._draining = False, False
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests that are being denoised."""
        return len(self._running)

    def submit(self, request: Request, model: str, *, priority: int = 0, deadline_seconds: float | None = None,
               previews: int = 0) -> Ticket:
        """Let a request wait for its turn.

        Args:
            request: its seeds are resolved now, so that running it again gives the same images.
            model: name of a pipeline.
            priority: higher ones run first; ten seconds of waiting make up for one.
            deadline_seconds: from now; a request that was not started by then fails.
            previews: how many previews its `Progress` shows, evenly over the steps, none after the last.

        Raises:
            InputError: no such model.
            QueueFullError: too many wait.
            UnavailableError: the engine is shutting down.
        """
        if model not in self.models:
            raise InputError(f"no model {model!r}", where="model", fix=f"one of {', '.join(self.models)}")
        if self._draining:
            raise UnavailableError("the engine is shutting down", where="engine", fix="ask another one")
        request = dataclasses.replace(request, seed=list(resolve_seeds(request.seed, request.count)))
        deadline = None if deadline_seconds is None else monotonic() + deadline_seconds
        ticket = Ticket(request, model, priority=priority, deadline=deadline,
                        previews=preview_steps(previews, request.steps), on_cancel=self.waiting.wake)
        self.waiting.put(ticket)
        return ticket

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end: after all that was accepted, or at once, cancelling it."""
        self._draining = True
        if not drain:
            self._stopping = True
        self.waiting.wake()
        self._worker.join()

    # ---- the worker ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping and not (self._draining and not self._running and not len(self.waiting)):
            self._drop_ended()
            self._admit()
            if self._running:
                self._round()
            else:
                self.waiting.wait(IDLE_SECONDS)
        for ticket in (*self.waiting.drain(), *(ticket for ticket, _ in self._running)):
            ticket.end(error=UnavailableError("the engine was shut down", where="engine", fix="ask again"))
        self._running = []

    def _drop_ended(self) -> None:
        for ticket in self.waiting.drop_ended():
            if ticket.cancelled:
                ticket.end(error=CancelledError(0, ticket.request.steps))
            else:
                ticket.end(error=UnavailableError("its deadline passed before its turn", where="queue",
                                                  fix="ask again later, or allow more time"))
        for ticket, job in self._running:
            if ticket.cancelled:
                job.cancel()

    def _admit(self) -> None:
        """Start waiting requests, as many as there is room for, prompts and images of one model encoded together."""
        room = self._most - sum(ticket.images for ticket, _ in self._running)
        first = self.waiting.first()
        if first is not None and not self._running:
            room = max(room, first.images)  # a request of more images than the engine's share runs by itself
        by_model: dict[str, list[Ticket]] = {}
        for ticket in self.waiting.take(self.models, room):
            by_model.setdefault(ticket.model, []).append(ticket)
        for model, tickets in by_model.items():
            for ticket in tickets:
                ticket.start()
                self._watch("wait", monotonic() - ticket.created)
            self._running += self._prepared(self.models[model], tickets)

    def _prepared(self, pipeline: Steppable, tickets: list[Ticket]) -> list[tuple[Ticket, Job]]:
        try:
            return list(zip(tickets, pipeline.prepare([ticket.request for ticket in tickets]), strict=True))
        except Exception as error:
            if len(tickets) == 1:
                tickets[0].end(error=error)
                return []
            # One of them cannot be prepared: which one shows when each is by itself.
            return [pair for ticket in tickets for pair in self._prepared(pipeline, [ticket])]

    def _round(self) -> None:
        """One step of everything that runs, then the images of what is done."""
        began, pairs = monotonic(), self._running
        self._watch("batch", sum(ticket.images for ticket, _ in pairs))
        for model, pipeline in self.models.items():
            if jobs := [job for ticket, job in pairs if ticket.model == model]:
                pipeline.advance(jobs)
        for ticket, job in pairs:
            if not job.done:
                self._report(ticket, job)
        done = [(ticket, job) for ticket, job in pairs if job.done]
        self._running = [(ticket, job) for ticket, job in pairs if not job.done]
        for model, pipeline in self.models.items():
            if ours := [(ticket, job) for ticket, job in done if ticket.model == model]:
                self._finish(pipeline, ours)
        seconds = monotonic() - began
        self._watch("round", seconds)
        if done:
            steps = sum(job.total for _, job in done) / len(done)
            self.waiting.served(sum(ticket.images for ticket, _ in pairs), max(seconds * steps, 1e-6))

    def _report(self, ticket: Ticket, job: Job) -> None:
        preview = self.models[ticket.model].preview(job.estimate) if job.index in ticket.previews else None
        ticket.step(Progress(job.index, job.total, preview))

    def _finish(self, pipeline: Steppable, pairs: list[tuple[Ticket, Job]]) -> None:
        """Decode together, and end the tickets."""
        for (ticket, job), images in zip(pairs, pipeline.finish([job for _, job in pairs]), strict=True):
            if job.error is not None:
                ticket.end(error=job.error)
            else:
                self._watch("service", monotonic() - (ticket.started or ticket.created))
                ticket.end(images)


def preview_steps(count: int, steps: int) -> frozenset[int]:
    """After which steps a preview is shown: `count` of them evenly spread, fewer if there are fewer steps before the
    last."""
    count = min(count, max(steps - 1, 0))
    return frozenset(max(1, (i + 1) * steps // (count + 1)) for i in range(count))
