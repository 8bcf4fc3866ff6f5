"""`Dispatcher`: takes jobs from a store to a pool, and images back; the only one that ends jobs besides their clients.

    with Dispatcher(store, pool, catalog) as dispatcher:     # at its end what runs is finished, or queued again
        ...

No more jobs are claimed than keep the pool busy: the others wait in the store, where a job of higher priority still
overtakes them. A job in its last attempt, since engines died while it ran, runs alone: if this one dies too, it was
that job, and no other fails with it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.errors import DeployError, UnavailableError
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.state.job_run import AGAIN, BACK, JobRun, reason_of, result_of, verdict
from runtimes.serving.state.order import Order
from runtimes.serving.state.result_cache import ResultCache
from runtimes.serving.state.store import LEASE_SECONDS, MOST_ATTEMPTS, QUEUED, RUNNING, FullError, Store, StoredJob
from runtimes.serving.state.written_images import WrittenImage, written

if TYPE_CHECKING:
    from runtimes.serving.engine.contract import Generated, Pool
    from runtimes.serving.engine.ticket import Progress

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.5  # between looks at what nothing announces: places in the pool's queue, leases that ran out
FULL_SECONDS = (2.0, 60.0)  # before a full disk is tried again: at first, and at most
BUSY_SECONDS = 1.0  # before a pool is asked again that refused, at most
END_SECONDS = 10.0  # for a pool to end what was cancelled


class Served(Protocol):
    """What is asked of a served model: `engine.catalog.ServedModel` is one."""

    @property
    def digest(self) -> str:
        """Of its bundle."""


@dataclass(frozen=True)
class Writing:
    """How results are written and which jobs are taken.

    Attributes:
        safety: "off", "flag" or "replace": what is done with images that a safety checker flags.
        metadata: whether files say how they were made.
        previews: of a job, evenly over its steps.
        most_jobs: claimed at a time: twice what the pool runs keeps it busy.
    """

    safety: str = "flag"
    metadata: bool = True
    previews: int = 10
    most_jobs: int = 16


class Dispatcher:
    """Runs a store's jobs on a pool. Its threads start with it; `stop` ends them."""

    def __init__(self, store: Store, pool: Pool, models: Mapping[str, Served], *, writing: Writing | None = None,
                 cache: ResultCache | None = None, watch: Callable[[str, float], None] = lambda name, value: None,
                 on_full: Callable[[], None] = lambda: None) -> None:
        """Begin to claim.

        Args:
            store: has the jobs.
            pool: runs them.
            models: what is served now, by name; it may change.
            writing: how results are written.
            cache: of finished images, which the synchronous requests use too; None for none.
            watch: receives figures by name: "job wait", "job service" and "write" in seconds, "job images" and "job
                steps" of all its images.
            on_full: called where the disk is full, so that somebody makes room.
        """
        self._store, self._pool, self._models = store, pool, models
        self._writing, self._cache = writing or Writing(), ResultCache(0) if cache is None else cache
        self._watch, self._on_full = watch, on_full
        self.name = f"dispatcher-{secrets.token_hex(4)}"
        self._runs: dict[str, JobRun] = {}
        self._returns: dict[str, tuple[StoredJob, str, bool]] = {}  # to be put back as soon as the disk takes it
        self._changed = threading.Condition()
        self._noted: set[str] = set()
        self._look, self._stopping, self._closing = True, False, False
        self._not_before, self._full_seconds, self._renewed, self._looked = 0.0, FULL_SECONDS[0], monotonic(), 0.0
        self._writers = ThreadPoolExecutor(2, "image-writer")
        self._threads = [threading.Thread(target=work, name=name, daemon=True)
                         for name, work in (("dispatcher", self._work), ("dispatcher-changes", self._follow))]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> int:
        """Jobs that are claimed and have not ended."""
        return len(self._runs) + len(self._returns)

    def stop(self, seconds: float = 0.0) -> None:
        """Claim nothing more, and end: what has not started is queued again, what runs is finished.

        Args:
            seconds: for that; what still runs then is queued again. The pool must be open until this returns.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._return_all(lambda run: run.ticket.started is None)
        self._wait_for_runs(seconds)
        self._return_all(lambda run: True)
        self._wait_for_runs(END_SECONDS)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._writers.shutdown()
        for run in list(self._runs.values()):
            self._put_back(run.job)
        self._return_again()

    def _return_all(self, chosen: Callable[[JobRun], bool]) -> None:
        for run in list(self._runs.values()):
            if chosen(run):
                run.returning = True
                run.ticket.cancel()

    def _wait_for_runs(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._runs, seconds)

    # ---- threads -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Hear of jobs that come and of jobs that others end."""
        number = -1
        while not self._closing:
            try:
                changes = self._store.changes(number, LOOK_SECONDS)
            except Exception:
                logger.exception("the state does not say what changed")
                time.sleep(LOOK_SECONDS)
                continue
            missed, number = changes.missed or number < 0, changes.number
            for identity in list(self._runs) if missed else changes.jobs:
                run = self._runs.get(identity)
                if run is not None and not run.returning and self._is_ended(identity, changes.jobs.get(identity)):
                    run.ticket.cancel()
            if missed or QUEUED in changes.jobs.values():
                with self._changed:
                    self._look = True
                    self._changed.notify_all()

    def _is_ended(self, identity: str, status: str | None) -> bool:
        if status is not None:
            return status not in (QUEUED, RUNNING)
        try:
            return self._store.job(identity).status not in (QUEUED, RUNNING)
        except DeployError:
            return True

    def _work(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._look or self._noted or self._closing, LOOK_SECONDS)
                noted, self._noted, self._look = self._noted, set(), False
            try:
                self._turn(noted)
            except Exception as error:  # whatever it was, jobs are claimed on; those that this one left come back
                logger.log(logging.WARNING if isinstance(error, DeployError) else logging.ERROR,
                           "jobs are not claimed for a moment: %s", error, exc_info=not isinstance(error, DeployError))
                self._pause(FULL_SECONDS[0])

    def _turn(self, noted: set[str]) -> None:
        self._return_again()
        now = monotonic()
        if look := now - self._looked > LOOK_SECONDS:
            self._looked = now
        for identity, run in list(self._runs.items()):
            if identity in noted or (look and run.ticket.started is None):
                self._report(run)
        if now - self._renewed > LEASE_SECONDS / 4:
            self._renewed = now
            self._store.renew(self.name, [*self._runs, *self._returns])
        if not self._stopping and now >= self._not_before:
            self._claim()

    def _report(self, run: JobRun) -> None:
        news = run.news(self._pool.position(run.ticket) if run.ticket.started is None else 0)
        if news is not None and not run.ticket.future.done():
            self._store.report(run.job.id, news)

    def _claim(self) -> None:
        """As many jobs as there is room for; none beside one in its last attempt."""
        runs = list(self._runs.values())
        room = self._writing.most_jobs - len(runs)
        if room > 0 and not any(run.job.attempts >= MOST_ATTEMPTS for run in runs):
            for job in self._store.claim(self.name, None, room, idle=not runs):
                if job.id in self._runs:  # its lease ran out, since this machine slept
                    self._runs[job.id].job = job
                else:
                    self._submit(job)

    # ---- one job -------------------------------------------------------------------------------------------------

    def _submit(self, job: StoredJob) -> None:
        """Give a job to the pool, or end it, or put it back."""
        try:
            if job.model not in self._models:
                self._fail(job, f"the model {job.model!r} is not served any more")
                return
            order = Order.from_json(job.request, self._store.files(job.id))
            if (images := self._cache.get(order.key(digest := self._models[job.model].digest))) is not None:
                self._complete(job, images, digest, {"cached": True})
                self._look = True
                return
            request = order.request()
        except Exception as error:
            self._fail(job, reason_of(error), error)
            return
        try:
            deadline = None if job.deadline is None else max(job.deadline - time.time(), 0.0)
            ticket = self._pool.submit(request, job.model, priority=job.priority, deadline_seconds=deadline,
                                       previews=self._writing.previews, judge=self._writing.safety != "off")
        except UnavailableError as error:
            self._put_back(job)
            self._pause(min(error.retry_after, BUSY_SECONDS) if isinstance(error, QueueFullError) else BUSY_SECONDS)
        except Exception as error:
            self._fail(job, reason_of(error), error)
        else:
            run = self._runs[job.id] = JobRun(job, order, ticket)
            self._report(run)
            ticket.watch(lambda step: self._heard(run, step))
            if self._stopping:  # which did not see this one
                run.returning = True
                ticket.cancel()

    def _heard(self, run: JobRun, step: Progress | None) -> None:
        """In the pool's thread: a step of a job, or its end."""
        if step is None:
            if not self._closing:  # else `stop` has put it back
                self._writers.submit(self._end, run)
            return
        run.note(step)
        with self._changed:
            self._noted.add(run.job.id)
            self._changed.notify_all()

    def _end(self, run: JobRun) -> None:
        """In a writer's thread: what a ticket ended with becomes the job's end, or the job is put back."""
        try:
            error = run.ticket.future.exception()
            if error is None:
                self._store_images(run, run.ticket.result(0))
            elif run.returning or self._stopping:
                self._put_back(run.job)
            else:
                outcome, reason = verdict(error, tried_again=run.ticket.attempts > 0), reason_of(error)
                if outcome == BACK:
                    self._put_back(run.job)
                elif outcome == AGAIN:
                    self._put_back(run.job, reason, counts=True)
                else:
                    self._fail(run.job, reason, error)
        finally:
            with self._changed:
                self._runs.pop(run.job.id, None)
                self._look = True
                self._changed.notify_all()

    def _store_images(self, run: JobRun, generated: Generated) -> None:
        began = monotonic()
        if not generated.digest and (served := self._models.get(run.job.model)) is not None:
            generated = replace(generated, digest=served.digest)  # an engine of given pipelines knows no bundles
        try:
            images = written(generated, run.order, safety=self._writing.safety, metadata=self._writing.metadata)
        except Exception as error:
            self._fail(run.job, reason_of(error), error)
            return
        self._cache.put(run.order.key(generated.digest), images)
        measured = {"seconds": generated.seconds, "batch": generated.batch}
        if self._complete(run.job, images, generated.digest, measured):
            self._watch("write", monotonic() - began)
            self._watch("job wait", max((run.ticket.started or began) - run.ticket.created, 0.0))
            self._watch("job service", began - (run.ticket.started or began))
            self._watch("job images", len(images))
            self._watch("job steps", len(images) * run.ticket.request.steps)

    def _complete(self, job: StoredJob, images: Sequence[WrittenImage], digest: str, measured: dict[str, Any]) -> bool:
        """Store images; a job that the disk has no room for is put back."""
        result = result_of([image.seed for image in images], [image.flagged for image in images], digest, **measured)
        try:
            ended = self._store.complete(job.id, [(image.content, image.kind) for image in images], result)
            self._full_seconds = FULL_SECONDS[0]
            return ended
        except FullError as error:
            logger.warning("a job is put back: %s", error)
            self._put_back(job)
            self._pause(self._full_seconds)
            self._full_seconds = min(2 * self._full_seconds, FULL_SECONDS[1])
            self._on_full()
        except Exception as error:
            logger.exception("images of a job could not be stored")
            self._put_back(job, reason_of(error), counts=True)
        return False

    def _fail(self, job: StoredJob, reason: str, error: BaseException | None = None) -> None:
        if error is not None and not isinstance(error, DeployError):
            logger.error("a job failed", exc_info=error)
        try:
            self._store.fail(job.id, reason, attempt=job.attempts)
        except Exception as failure:
            logger.warning("a job is put back, since its failure could not be stored: %s", failure)
            self._put_back(job)

    def _put_back(self, job: StoredJob, reason: str = "", *, counts: bool = False) -> None:
        """Queue a claimed job again; as soon as the state takes it."""
        try:
            self._store.requeue(job.id, reason, attempt=job.attempts, counts=counts)
            self._returns.pop(job.id, None)
        except Exception as error:
            logger.warning("a job is put back later: %s", error)
            self._returns[job.id] = (job, reason, counts)

    def _return_again(self) -> None:
        for job, reason, counts in list(self._returns.values()):
            self._put_back(job, reason, counts=counts)

    def _pause(self, seconds: float) -> None:
        self._not_before = max(self._not_before, monotonic() + seconds)
