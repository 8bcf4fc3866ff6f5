"""`RayPool`: the pool of a front, whose requests run on whichever engine replica of the cluster has room.

A replica that dies takes nothing with it: its requests run again on another, from their beginning, and give the same
images. What Ray does not know, priorities and deadlines, is kept in order here, before requests are sent.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import CancelledError, DeployError, InputError, UnavailableError
from runtimes.serving.cluster.engine_replica import Call, Message
from runtimes.serving.engine.contract import Generated, PoolStatus, WorkerStatus
from runtimes.serving.engine.engine import shutting_down, with_seeds
from runtimes.serving.engine.rate import Rate
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.engine.waiting import Waiting

if TYPE_CHECKING:
    from runtimes.inputs.request import Request

logger = logging.getLogger(__name__)
MOST_ATTEMPTS = 3
RETRY_SECONDS = 0.2  # after a replica died, doubled with every attempt
LOOK_SECONDS = 0.5  # deadlines
STATUS_SECONDS = 5.0

Stream = Callable[[Call], AsyncIterator[Message]]


class RayPool:
    """Satisfies `engine.contract.Pool`. One thread with an event loop reads what the replicas send."""

    def __init__(self, stream: Stream, models: Mapping[str, Any], *, lost: tuple[type[BaseException], ...],
                 most_waiting: int = 256, most_sent: int = 64,
                 workers: Callable[[], tuple[WorkerStatus, ...]] = lambda: ()) -> None:
        """Start the thread.

        Args:
            stream: sends a request to a replica, and gives what comes back; closing it cancels the request there.
            models: names that are served.
            lost: errors that say that a replica died, not that the request is wrong.
            most_waiting: requests that wait here; more are refused.
            most_sent: requests that Ray has at a time, waiting or running: enough for it to see that replicas are
                missing, few enough that the order of the rest is ours.
            workers: asks the cluster for its replicas; may block.
        """
        self.waiting = Waiting(most_waiting)
        self._stream, self._models, self._lost, self._most = stream, models, lost, most_sent
        self._workers = workers
        self._known: tuple[WorkerStatus, ...] = ()
        self._sent: dict[Ticket, asyncio.Task[None]] = {}
        self._rate, self._draining = Rate(), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ray-pool", daemon=True)
        self._thread.start()
        self._timers = asyncio.run_coroutine_threadsafe(self._look(), self._loop)

    def submit(self, request: Request, model: str, *, priority: int = 0, deadline_seconds: float | None = None,
               previews: int = 0, judge: bool = False) -> Ticket:
        """Let a request wait for its turn: see `contract.Pool.submit`."""
        if model not in self._models:
            raise InputError(f"no model {model!r:.120}", where="model", fix=f"one of {', '.join(self._models)}")
        if self._draining:
            raise shutting_down()
        deadline = None if deadline_seconds is None else monotonic() + deadline_seconds
        ticket = Ticket(with_seeds(request), model, priority=priority, deadline=deadline, previews=previews,
                        judge=judge, on_cancel=lambda: self._cancelled(ticket))
        self.waiting.put(ticket)
        self._loop.call_soon_threadsafe(self._send)
        return ticket

    def position(self, ticket: Ticket) -> int:
        """How many come before a ticket here; 0 for the next and for one that was sent."""
        return self.waiting.position(ticket)

    def status(self) -> PoolStatus:
        """Replicas as they were a few seconds ago, and this front's own requests."""
        sent = list(self._sent)
        started = sum(ticket.started is not None for ticket in sent)
        return PoolStatus(self._known, len(self.waiting) + len(sent) - started, started, self._rate.per_second(),
                          {"retry_after": self.waiting.retry_after()})

    @property
    def alive(self) -> bool:
        """Whether the thread runs that everything needs."""
        return self._thread.is_alive()

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end: after all that was accepted, or at once, cancelling it."""
        self._draining = True
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(drain), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- in the loop ---------------------------------------------------------------------------------------------

    def _cancelled(self, ticket: Ticket) -> None:
        """A ticket was cancelled, by any thread."""
        if self.waiting.remove(ticket):
            ticket.end(error=CancelledError(0, ticket.request.steps))
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop, ticket)

    def _stop(self, ticket: Ticket) -> None:
        if (task := self._sent.get(ticket)) is not None:
            task.cancel()

    def _send(self) -> None:
        """Give Ray the next requests, as many as it may have."""
        self.waiting.end_those_that_are_late()
        while len(self._sent) < self._most and (ticket := self.waiting.first()) is not None:
            if self.waiting.remove(ticket):
                self._sent[ticket] = task = self._loop.create_task(self._run(ticket))
                task.add_done_callback(partial(self._over, ticket))

    def _over(self, ticket: Ticket, _: asyncio.Task[None]) -> None:
        """A ticket is with Ray no more; one that was cancelled before its first step has not ended by itself."""
        self._sent.pop(ticket, None)
        if not ticket.future.done():
            done = ticket.progress.index if ticket.progress else 0
            ticket.end(error=CancelledError(done, ticket.request.steps) if ticket.cancelled else shutting_down())
        self._send()

    async def _run(self, ticket: Ticket) -> None:
        """A ticket to its end, on as many replicas as that takes."""
        try:
            ticket.end(await self._generated(ticket))
        except DeployError as error:
            ticket.end(error=error)
        except Exception as error:
            logger.exception("a replica failed")
            ticket.end(error=DeployError(f"a fault of the program: {type(error).__name__}", where="engine",
                                         fix="please report it, with the server's log"))

    async def _generated(self, ticket: Ticket) -> Generated:
        while True:
            try:
                return await self._attempt(ticket)
            except self._lost as error:
                ticket.attempts += 1
                logger.warning("a replica was lost with a request, attempt %d: %s", ticket.attempts,
                               str(error).partition("\n")[0])
                if ticket.attempts >= MOST_ATTEMPTS:
                    raise UnavailableError(f"{ticket.attempts} engines ended while they ran it", where="engine",
                                           fix="ask again") from error
                await asyncio.sleep(RETRY_SECONDS * 2 ** ticket.attempts)

    async def _attempt(self, ticket: Ticket) -> Generated:
        left = None if ticket.deadline is None else max(ticket.deadline - monotonic(), 0.0)
        call = Call(ticket.request, ticket.model, ticket.priority, left if ticket.started is None else None,
                    ticket.previews, ticket.judge)
        async with aclosing(self._stream(call)) as messages:  # type: ignore[type-var]
            async for message in messages:
                if isinstance(message, Progress):
                    if ticket.started is None:
                        ticket.start()
                    ticket.step(message)
                elif isinstance(message, Generated):
                    self.waiting.served(ticket.images, message.work_seconds)
                    self._rate.add(ticket.images)
                    return _writable(message)
                else:
                    raise message
        raise DeployError("a replica ended a request without a word", where="engine", fix="please report it")

    async def _look(self) -> None:
        """Deadlines of what waits, and the replicas, as long as the pool lives."""
        asked = -STATUS_SECONDS
        while True:
            self._send()
            if monotonic() - asked >= STATUS_SECONDS:
                asked = monotonic()
                try:
                    self._known = await asyncio.to_thread(self._workers)
                except Exception as error:  # the cluster's controller is being started again
                    logger.warning("the cluster does not say how it is: %s", str(error).partition("\n")[0])
            await asyncio.sleep(LOOK_SECONDS)

    async def _end(self, drain: bool) -> None:
        if not drain:
            for ticket in self.waiting.drain():
                ticket.end(error=shutting_down())
            for task in list(self._sent.values()):
                task.cancel()
        while self._sent or len(self.waiting):
            await asyncio.wait([*self._sent.values(), asyncio.ensure_future(asyncio.sleep(LOOK_SECONDS))],
                               return_when=asyncio.FIRST_COMPLETED)
        self._timers.cancel()
        await asyncio.sleep(0)  # for the cancelled timer to end


def _writable(generated: Generated) -> Generated:
    """Arrays that Ray has in shared memory cannot be written to; those of an engine can."""
    if isinstance(generated.images, np.ndarray) and not generated.images.flags.writeable:
        return replace(generated, images=generated.images.copy())
    return generated
