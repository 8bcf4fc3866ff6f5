"""The engine: a queue, and a worker that advances all requests that fit beside each other, one step at a time.

    with Engine({"emoji": runtimes.load("build/reference-onnxruntime-fp32")}) as engine:
        tickets = [engine.submit(Request("a red apple", steps=n), "emoji") for n in (4, 10, 25)]
        images = [ticket.result().images for ticket in tickets]          # or: (await ticket).images

A request joins at any step and leaves when it is done: short ones are not held up by long ones. What it gives does not
depend on its company (`Pipeline.advance`). One thread owns the pipelines; nothing here knows HTTP or disks.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from runtimes.codec.autoencoder import to_uint8
from runtimes.codec.pixels import to_pil
from runtimes.errors import CancelledError, DeployError, InputError, UnavailableError
from runtimes.inputs.noise import resolve_seeds
from runtimes.serving.engine.contract import Generated, PoolStatus, WorkerStatus
from runtimes.serving.engine.lanes import Lane, Lanes, Running
from runtimes.serving.engine.models import resident_bytes
from runtimes.serving.engine.rate import Rate
from runtimes.serving.engine.sources import GivenModels, Loaded, Source, Steppable
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import Waiting

if TYPE_CHECKING:
    from runtimes.inputs.request import Request
    from runtimes.pipeline.job import Job

logger = logging.getLogger(__name__)
MOST_WAITING, MOST_IMAGES = 256, 8
IDLE_SECONDS = 0.5
COMPANY_SECONDS = 0.002


class Engine:
    """Requests in, tickets out. Any thread may submit; a context manager that drains at its end."""

    def __init__(self, models: Mapping[str, Steppable] | Source, *, most_waiting: int = MOST_WAITING,
                 most_images: int = MOST_IMAGES, company_seconds: float = COMPANY_SECONDS,
                 watch: Callable[[str, float], None] = lambda name, value: None) -> None:
        """Start the worker.

        Args:
            models: pipelines by the name that requests give, or `models.Models` that loads them on demand.
            most_waiting: requests in the queue; more are refused.
            most_images: images that are denoised side by side.
            company_seconds: how long the first request of an idle engine waits for others, which share all its calls;
                not after a time in which requests came one by one.
            watch: receives figures by name: "batch" images of a step, "wait", "service" and "step" in seconds.
        """
        self.models: Source = GivenModels(models) if isinstance(models, Mapping) else models
        self.waiting = Waiting(most_waiting)
        self.models.on_change = self.waiting.wake
        self._most, self._company, self._watch = most_images, company_seconds, watch
        self._lanes, self._rate = Lanes(), Rate()
        self._stopping, self._draining, self._accepting = False, False, threading.Lock()
        self._call_began: float | None = None
        self._had_company = True  # whether requests ran beside each other since the engine was idle
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> int:
        """Requests that are being denoised."""
        return len(self._lanes.running())

    @property
    def busy_seconds(self) -> float:
        """Since the step, encoding or decoding that runs now began; 0 between two."""
        began = self._call_began
        return 0.0 if began is None else monotonic() - began

    def submit(self, request: Request, model: str, *, priority: int = 0, deadline_seconds: float | None = None,
               previews: int = 0, judge: bool = False) -> Ticket:
        """Let a request wait for its turn: see `contract.Pool.submit`."""
        names = self.models.names()
        if model not in names:
            raise InputError(f"no model {model!r:.120}", where="model", fix=f"one of {', '.join(names)}")
        request = with_seeds(request)
        deadline = None if deadline_seconds is None else monotonic() + deadline_seconds
        ticket = Ticket(request, model, priority=priority, deadline=deadline, previews=previews, judge=judge,
                        on_cancel=lambda: self._cancelled(ticket))
        with self._accepting:
            if self._draining:
                raise shutting_down()
            self.waiting.put(ticket)
        return ticket

    def position(self, ticket: Ticket) -> int:
        """How many come before a ticket; 0 for the next and for one that waits no more."""
        return self.waiting.position(ticket)

    def status(self) -> PoolStatus:
        """Worker and queue as they are now."""
        running = self._lanes.running()
        worker = WorkerStatus("engine", self._worker.is_alive(), sum(one.ticket.images for one in running),
                              tuple(one.name for one in self.models.loaded()), resident_bytes())
        return PoolStatus((worker,), len(self.waiting), len(running), self._rate.per_second(),
                          {"retry_after": self.waiting.retry_after()})

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end: after all that was accepted, or at once, cancelling it."""
        with self._accepting:
            self._draining = True
        if not drain:
            self._stopping = True
        self.waiting.wake()
        self._worker.join()

    def _cancelled(self, ticket: Ticket) -> None:
        """A ticket was cancelled: what waits ends here, what runs is ended by the worker."""
        if self.waiting.remove(ticket):
            ticket.end(error=CancelledError(0, ticket.request.steps))
        else:
            self.waiting.wake()

    # ---- the worker ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping and not (self._draining and not self._lanes and not len(self.waiting)):
            try:
                self._turn()
            except Exception as error:  # a bug of ours: what it may concern fails, and the engine goes on
                logger.exception("the engine failed in a turn; its requests fail with it")
                for ticket in self.waiting.drain():
                    ticket.end(error=_fault(error))
                for one in self._lanes.running():
                    self._end(one, error=_fault(error))
                self.waiting.wait(IDLE_SECONDS, self.waiting.changes)  # or a lasting fault would fill the log
            self._call_began = None
        for ticket in (*self.waiting.drain(), *(one.ticket for one in self._lanes.running())):
            ticket.end(error=UnavailableError("the engine was shut down", where="engine", fix="ask again"))
        for one in self._lanes.running():
            self._end(one)

    def _turn(self) -> None:
        """One step of the requests whose turn it is, or a wait for something to do."""
        since = self.waiting.changes
        self.waiting.end_those_that_are_late()
        for one in self._lanes.running():
            if one.ticket.cancelled:
                self._end(one, error=CancelledError(one.job.index, one.job.total))
        self._admit()
        lane = self._lanes.next()
        if lane is None:
            self.models.tidy()
            self.waiting.wait(min(IDLE_SECONDS, self.waiting.seconds_to_deadline()), since)
        else:
            self._step(lane)

    def _admit(self) -> None:
        """Start waiting requests, as many as there is room for, prompts and images of one model encoded together."""
        ready = self._ready()
        try:
            self._start(ready)
        finally:
            for loaded in ready.values():
                self.models.release(loaded)

    def _start(self, ready: Mapping[str, Loaded]) -> None:
        first = self.waiting.first(ready)
        if first is None:
            return
        room = self._most - sum(one.ticket.images for one in self._lanes.running())
        if not self._lanes:
            room = max(room, first.images)  # a request of more images than the engine's share runs by itself
            if self._company and self._had_company:
                self.waiting.wait_for_images(room, self._company)
            self._had_company = False
        by_model: dict[str, list[Ticket]] = {}
        for ticket in self.waiting.take(ready, room):
            by_model.setdefault(ticket.model, []).append(ticket)
        for model, tickets in by_model.items():
            for ticket in tickets:
                ticket.start()
                self._watch("wait", monotonic() - ticket.created)
            self._prepare(ready[model], tickets)

    def _ready(self) -> dict[str, Loaded]:
        """Models that can run what waits for them now, held; what waits for one that cannot be loaded ends here.

        Where room must be made for a model whose turn it is, those behind it wait: what is loaded falls idle then.
        """
        ready: dict[str, Loaded] = {}
        for model in self.waiting.models():
            try:
                loaded = self.models.find(model)
            except DeployError as error:
                self._refuse(model, error)
            except Exception as error:
                logger.exception("%s cannot be loaded", model)
                self._refuse(model, _fault(error))
            else:
                if loaded is not None:
                    self.models.hold(loaded)  # or finding the next might unload it
                    ready[model] = loaded
                elif self.models.blocked(model):
                    break
        return ready

    def _refuse(self, model: str, error: DeployError) -> None:
        for ticket in self.waiting.ranked():
            if ticket.model == model and self.waiting.remove(ticket):
                ticket.end(error=error)

    def _prepare(self, loaded: Loaded, tickets: list[Ticket]) -> None:
        self._call_began = began = monotonic()
        try:
            jobs = loaded.pipeline.prepare([ticket.request for ticket in tickets])
            pairs = list(zip(tickets, jobs, strict=True))
        except Exception as error:
            if len(tickets) == 1:
                tickets[0].end(error=_known(error))
                return
            for ticket in tickets:  # one of them cannot be prepared: which one shows when each is by itself
                self._prepare(loaded, [ticket])
            return
        for ticket, job in pairs:
            self.models.hold(loaded)
            one = Running(ticket, job, loaded, preview_steps(ticket.previews, job.total))
            one.work_seconds = (monotonic() - began) / len(pairs)
            self._had_company = self._had_company or bool(self._lanes)
            self._lanes.add(one)

    def _step(self, lane: Lane) -> None:
        """One step of what runs in a lane, then the images of what is done."""
        self._call_began = began = monotonic()
        members, images = list(lane.members), lane.images
        self._watch("batch", images)
        try:
            lane.loaded.pipeline.advance([one.job for one in members])
        except Exception as error:
            logger.exception("%s failed in a step", lane.loaded.name)
            for one in members:
                self._end(one, error=_known(error))
            return
        seconds = monotonic() - began
        self._watch("step", seconds)
        for one in members:
            one.work_seconds += seconds * one.ticket.images / images
            if not one.job.done:
                self._report(one)
        if done := [one for one in members if one.job.done]:
            self._finish(lane.loaded.pipeline, done)
        lane.spent += monotonic() - began

    def _report(self, one: Running) -> None:
        preview = None
        if one.job.index in one.previews:
            try:
                preview = one.loaded.pipeline.preview(one.job.estimate)
            except Exception:
                logger.exception("%s cannot show a preview", one.loaded.name)
        one.ticket.step(Progress(one.job.index, one.job.total, preview))

    def _finish(self, pipeline: Steppable, done: list[Running]) -> None:
        """Decode together, and end the tickets."""
        began = monotonic()
        try:
            results = pipeline.finish([one.job for one in done])
        except Exception as error:
            logger.exception("%s failed to decode", done[0].loaded.name)
            for one in done:
                self._end(one, error=_known(error))
            return
        seconds = monotonic() - began
        for one, images in zip(done, results, strict=True):
            one.work_seconds += seconds * one.ticket.images / sum(other.ticket.images for other in done)
            if one.job.error is not None:
                self._end(one, error=_known(one.job.error))
                continue
            try:
                flagged = _judged(pipeline, images) if one.ticket.judge else ()
            except Exception as error:  # an image that nobody could judge is not given out
                self._end(one, error=_known(error))
                continue
            self._end(one, self._generated(one, images, flagged))

    def _generated(self, one: Running, images: Any, flagged: tuple[bool, ...]) -> Generated:
        self.waiting.served(one.ticket.images, one.work_seconds)
        self._rate.add(one.ticket.images)
        self._watch("service", monotonic() - (one.ticket.started or one.ticket.created))
        return Generated(images, one.loaded.digest, flagged, monotonic() - one.began, mean_batch(one.job),
                         one.work_seconds)

    def _end(self, one: Running, result: Generated | None = None, error: Exception | None = None) -> None:
        """A request runs no more."""
        self._lanes.remove(one)
        self.models.release(one.loaded)
        if result is not None or error is not None:
            one.ticket.end(result, error)


def with_seeds(request: Request) -> Request:
    """A request that gives the same images whenever it runs."""
    return dataclasses.replace(request, seed=list(resolve_seeds(request.seed, request.count)))


def shutting_down() -> UnavailableError:
    """What is answered to requests that come too late."""
    return UnavailableError("the engine is shutting down", where="engine", fix="ask another one")


def preview_steps(count: int, steps: int) -> frozenset[int]:
    """After which steps a preview is shown: `count` of them evenly spread, fewer if there are fewer steps before the
    last."""
    count = min(count, max(steps - 1, 0))
    return frozenset(max(1, (i + 1) * steps // (count + 1)) for i in range(count))


def mean_batch(job: Job) -> float:
    """Images that shared a denoiser call with those of a job, its own included; tiles run by themselves."""
    count = len(job.plan.wanted.seeds)
    return float(count) if job.plan.wanted.tiling is not None or not job.calls else job.company / job.calls


def _judged(pipeline: Steppable, images: Any) -> tuple[bool, ...]:
    """Which images the bundle's safety checker flags; nothing without a checker, or of latents."""
    if not pipeline.judges or (not isinstance(images, list) and images.shape[-1] != 3):
        return ()
    return tuple(pipeline.flagged(images if isinstance(images, list) else to_pil(to_uint8(images))))


def _known(error: Exception) -> Exception:
    return error if isinstance(error, DeployError) else _fault(error)


def _fault(error: Exception) -> DeployError:
    """A bug of ours, or of a library, as a client sees it; the log has the whole of it."""
    return DeployError(f"a fault of the program: {type(error).__name__}", where="engine",
                       fix="please report it, with the server's log")
