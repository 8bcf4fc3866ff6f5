"""`WorkerPool`: one queue, and the workers that take from it: processes of this machine, and engines of others.

    catalog = Catalog(["emoji=build/emoji"])
    with WorkerPool.of(catalog, ServerOptions(device="cpu", workers=2)) as pool:
        image = pool.submit(Request("a red apple"), "emoji").result().images[0]
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from runtimes.errors import CancelledError, InputError, UnavailableError
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.contract import Generated, PoolStatus, WorkerStatus
from runtimes.serving.engine.engine import shutting_down, with_seeds
from runtimes.serving.engine.rate import Rate
from runtimes.serving.engine.ticket import Ticket
from runtimes.serving.engine.waiting import Waiting
from runtimes.serving.options import ServerOptions
from runtimes.serving.workers.channel import Channel, Message, ProtocolError
from runtimes.serving.workers.connected_engine import Offer, WorkerOptions
from runtimes.serving.workers.encoded import decoded_error, decoded_progress, decoded_result
from runtimes.serving.workers.joining import Listener, read_key
from runtimes.serving.workers.link import Link, can_run, choose
from runtimes.serving.workers.local_worker import LocalWorker, described
from runtimes.serving.workers.placement import placed

if TYPE_CHECKING:
    from runtimes.inputs.request import Request

logger = logging.getLogger(__name__)
MOST_ATTEMPTS = 3
MOST_REMOTE = 64


@dataclass(frozen=True)
class Timing:
    """How long the pool waits for what.

    Attributes:
        lost_seconds: without a sign of life, after which a worker is ended.
        stuck_seconds: that one call of a network may take.
        hello_seconds: until a worker that was started, or has joined, must be ready.
        backoff_seconds, most_backoff_seconds: before a worker is started again that died soon: doubled each time.
        tick_seconds: between two looks at all of this.
    """

    lost_seconds: float = 30.0
    stuck_seconds: float = 900.0
    hello_seconds: float = 120.0
    backoff_seconds: float = 0.5
    most_backoff_seconds: float = 30.0
    tick_seconds: float = 0.25


class WorkerPool:
    """Requests in, tickets out, as `engine.contract.Pool`. Any thread may submit; a context manager that drains."""

    def __init__(self, catalog: Catalog, workers: Sequence[WorkerOptions], *, most_waiting: int = 256,
                 reload_seconds: float = 2.0, listen: tuple[str, int, bytes] | None = None, preload: bool = True,
                 timing: Timing | None = None, watch: Callable[[str, float], None] = lambda name, value: None) -> None:
        """Start the workers; `wait_until_ready` waits for them, `submit` need not.

        Args:
            catalog: bundles by name.
            workers: of this machine: see `placement.placed`.
            most_waiting: requests in the queue; more are refused.
            reload_seconds: how often the catalog is refreshed; 0 for never.
            listen: host, port and key for engines of other machines.
            preload: whether workers load bundles before they are asked for, as many as fit.
            timing: how long the pool waits for what.
            watch: receives figures by name: "wait" and "service" in seconds, "batch" mean images that shared calls.

        Raises:
            UnavailableError: the port is taken.
        """
        self.catalog, self.waiting = catalog, Waiting(most_waiting)
        self._timing, self._watch, self._preload = timing or Timing(), watch, preload
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)
        self._links: list[Link] = []
        self._rate = Rate()
        self._draining = False
        self._stop = threading.Event()
        self._local = [LocalWorker(options, self._timing.backoff_seconds, self._timing.most_backoff_seconds)
                       for options in workers]
        self.listener = None if listen is None else Listener(*listen, self._joined)
        for local in self._local:
            self._start(local)
        self._threads = [threading.Thread(target=self._supervise, name="workers", daemon=True)]
        if reload_seconds:
            self._threads.append(threading.Thread(target=self._reload, args=(reload_seconds,), name="reload",
                                                  daemon=True))
        for thread in self._threads:
            thread.start()

    @classmethod
    def of(cls, catalog: Catalog, options: ServerOptions,
           watch: Callable[[str, float], None] = lambda name, value: None) -> WorkerPool:
        """As the options of `serve` say: device, workers, memory, batch, queue, deterministic, reload_seconds, host,
        engine_port, engine_key_file.

        Raises:
            InputError: devices, workers or a key that cannot be used.
            UnavailableError: the port for engines is taken.
        """
        listen = None
        if options.engine_port:
            listen = options.host, options.engine_port, read_key(options.engine_key_file)
        return cls(catalog, placed(options), most_waiting=options.queue, reload_seconds=options.reload_seconds,
                   listen=listen, watch=watch)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, model: str, *, priority: int = 0, deadline_seconds: float | None = None,
               previews: int = 0, judge: bool = False) -> Ticket:
        """Let a request wait for its turn: see `contract.Pool.submit`."""
        if model not in self.catalog:
            raise InputError(f"no model {model!r:.120}", where="model", fix=f"one of {', '.join(self.catalog)}")
        deadline = None if deadline_seconds is None else monotonic() + deadline_seconds
        ticket = Ticket(with_seeds(request), model, priority=priority, deadline=deadline, previews=previews,
                        judge=judge, on_cancel=lambda: self._cancelled(ticket))
        with self._lock:
            if self._draining:
                raise shutting_down()
            self.waiting.put(ticket)
            self._dispatch()
        return ticket

    def position(self, ticket: Ticket) -> int:
        """How many come before a ticket; 0 for the next and for one that waits no more."""
        return self.waiting.position(ticket)

    def status(self) -> PoolStatus:
        """Workers and queue as they are now."""
        with self._lock:
            workers = [_status(local.options.name, local.link, local.restarts) for local in self._local]
            ours = {local.link for local in self._local}
            workers += [_status(link.name, link, 0) for link in self._links if link not in ours]
            running = sum(len(link.running) for link in self._links)
        return PoolStatus(tuple(workers), len(self.waiting), running, self._rate.per_second(),
                          {"retry_after": self.waiting.retry_after()})

    def wait_until_ready(self, seconds: float = 60.0) -> bool:
        """Whether a worker is there that takes requests, within so many seconds."""
        with self._ended:
            return self._ended.wait_for(lambda: any(link.ready for link in self._links), seconds)

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end: after all that was accepted, or at once, cancelling it.

        Another thread may close at once while one waits for the end of what was accepted.
        """
        with self._lock:
            self._draining = True
        if drain:
            with self._ended:
                self._ended.wait_for(lambda: self._stop.is_set() or (
                    not len(self.waiting) and not any(link.running for link in self._links)))
        self._stop.set()
        error = UnavailableError("the server was shut down", where="engine", fix="ask again")
        with self._ended:
            left = [*self.waiting.drain(), *(ticket for link in self._links for ticket in link.running.values())]
            links = list(self._links)
            for link in links:
                link.running.clear()
                link.say(Message("close", {"drain": False}))
            self._ended.notify_all()
        for ticket in left:
            ticket.end(error=error)
        if self.listener is not None:
            self.listener.close()
        for thread in self._threads:
            thread.join()
        for local in self._local:
            local.wait(10)
        for link in links:
            link.end()
            link.join(10)

    def _cancelled(self, ticket: Ticket) -> None:
        with self._lock:
            waited = self.waiting.remove(ticket)
            link = next((link for link in self._links if ticket.number in link.running), None)
            if link is not None:
                link.say(Message("cancel", {"id": ticket.number}))
            self._ended.notify_all()
        if waited:
            ticket.end(error=CancelledError(0, ticket.request.steps))

    # ---- giving out ----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give waiting tickets to workers that have room. Under the lock.

        A ticket that none has room for is not overtaken on the workers that could run it: it would wait for ever.
        """
        free = [link for link in self._links if link.ready and link.images < max(link.capacity, 1)]
        for ticket in self.waiting.ranked() if free else []:
            digest = self.catalog[ticket.model].digest
            link = choose(ticket, digest, free)
            if link is None:
                free = [other for other in free if not can_run(other, ticket.model, digest)]
            elif self.waiting.remove(ticket):
                ticket.start()
                self._watch("wait", monotonic() - ticket.created)
                link.give(ticket)
                if link.images >= link.capacity:
                    free.remove(link)
            if not free:
                return

    # ---- what workers say, in the threads of their links ---------------------------------------------------------

    def hear(self, link: Link, message: Message) -> None:
        """A worker said something."""
        match message.kind:
            case "step":
                if (ticket := link.running.get(message.get("id", int))) is not None:
                    ticket.step(decoded_progress(message))
            case "done":
                self._finish(link, message, decoded_result(message), None)
            case "failed":
                self._finish(link, message, None, decoded_error(message))
            case "status":
                with self._lock:
                    link.loaded = tuple(str(name) for name in message.get("loaded", list))
                    link.memory_bytes = message.get("memory_bytes", int)
                    link.busy_seconds = message.get("busy_seconds", float)
            case "hello" | "digests":
                self._greet(link, message)
            case kind:
                raise ProtocolError(f"{kind!r:.60} is nothing that a worker says")

    def unsent(self, link: Link, ticket: Ticket, error: Exception) -> None:
        """A request cannot be sent to a worker, by its own fault."""
        ticket.end(error=error)
        self._take_back(link, ticket.number)

    def lost(self, link: Link, reason: str) -> None:
        """A worker is gone: what it ran waits again, or has had its attempts."""
        with self._ended:
            self._links.remove(link)
            local = next((local for local in self._local if local.link is link), None)
            if local is not None:
                local.lost()
            tickets, link.running = list(link.running.values()), {}
            ended = [ticket for ticket in tickets if not self._again(ticket)]
            if not self._stop.is_set():
                logger.warning("the worker %s is gone: %s; %d requests wait again", link.name, reason,
                               len(tickets) - len(ended))
            self._dispatch()
            self._ended.notify_all()
        for ticket in ended:
            ticket.end(error=CancelledError(0, ticket.request.steps) if ticket.cancelled else UnavailableError(
                f"a worker died with it {ticket.attempts} times", where="engine", fix="see the server's log; it may "
                "need more memory than there is"))

    def _again(self, ticket: Ticket) -> bool:
        ticket.restart()
        if ticket.cancelled or ticket.attempts >= MOST_ATTEMPTS or self._stop.is_set():
            return False
        self.waiting.put_back(ticket)
        return True

    def _greet(self, link: Link, message: Message) -> None:
        with self._ended:
            link.digests = message.texts("digests")
            if message.kind == "hello":
                link.capacity, link.ready = max(message.get("capacity", int), 1), True
                logger.info("the worker %s is ready", link.name)
            ours = next((local for local in self._local if local.link is link), None)
            if ours is not None:
                link.digests = {name: model.digest for name, model in self.catalog.items()}
                # Not after a death: what was loaded then may have been the reason.
                for name in self.catalog if ours.first and self._preload else ():
                    link.say(Message("load", {"model": name}))
            self._dispatch()
            self._ended.notify_all()

    def _finish(self, link: Link, message: Message, result: Generated | None, error: Exception | None) -> None:
        ticket = link.running.get(message.get("id", int))
        if ticket is None:
            return
        if result is not None:
            alive = sum(other.ready for other in self._links)
            self.waiting.served(ticket.images, result.work_seconds / max(alive, 1))
            self._rate.add(ticket.images)
            self._watch("service", monotonic() - (ticket.started or ticket.created))
            self._watch("batch", result.batch)
        ticket.end(result, error)
        self._take_back(link, ticket.number)

    def _take_back(self, link: Link, number: int) -> None:
        """A ticket runs no more on a worker, which has room for others."""
        with self._ended:
            link.running.pop(number, None)
            self._dispatch()
            self._ended.notify_all()

    # ---- the workers' lives --------------------------------------------------------------------------------------

    def _start(self, local: LocalWorker) -> None:
        with self._lock:
            try:
                channel = local.start({name: Offer.of(model) for name, model in self.catalog.items()})
            except OSError as error:
                logger.error("the worker %s cannot be started: %s", local.options.name, error)
                local.lost()
                return
            local.link = Link(local.options.name, channel, self)
            self._links.append(local.link)
            local.link.start()

    def _joined(self, channel: Channel, address: str) -> None:
        """An engine of another machine has proved that it has the key."""
        with self._lock:
            link = Link(f"engine at {address}", channel, self)
            if len(self._links) - len(self._local) >= MOST_REMOTE or self._stop.is_set():
                logger.warning("the engine at %s is hung up on: %d have joined", address, MOST_REMOTE)
                channel.release()
                return
            self._links.append(link)
            link.start()

    def _supervise(self) -> None:
        """End workers that are lost or stuck, start those that died, end tickets whose deadline passed."""
        while not self._stop.wait(max(min(self._timing.tick_seconds, self.waiting.seconds_to_deadline()), 0.01)):
            self.waiting.end_those_that_are_late()
            with self._ended:
                self._ended.notify_all()
                links, now = list(self._links), monotonic()
            for link in links:
                if reason := self._fault(link, now):
                    logger.error("the worker %s is ended: %s", link.name, reason)
                    for local in self._local:
                        if local.link is link:
                            local.kill()
                    link.end()
            for local in self._local:
                if local.link is None and local.due <= now and not self._stop.is_set():
                    self._start(local)

    def _fault(self, link: Link, now: float) -> str:
        limits = self._timing
        if not link.ready and now - link.began > limits.hello_seconds:
            return f"it was not ready within {limits.hello_seconds:.0f} seconds"
        if link.ready and now - link.heard > limits.lost_seconds:
            return f"it has said nothing for {now - link.heard:.0f} seconds"
        if link.busy_seconds > limits.stuck_seconds:
            return f"one call has taken {link.busy_seconds:.0f} seconds"
        return ""

    def _reload(self, seconds: float) -> None:
        """Look at the bundles again and again; workers hear of those that changed before what is asked of them."""
        while not self._stop.wait(seconds):
            try:
                if not (changed := self.catalog.refresh()):
                    continue
            except Exception:
                logger.exception("the bundles could not be looked at")
                continue
            bundles = described({name: Offer.of(self.catalog[name]) for name in changed})
            with self._lock:
                for local in self._local:
                    if local.link is not None:
                        local.link.say(Message("bundles", {"bundles": bundles}))
                        local.link.digests = {name: model.digest for name, model in self.catalog.items()}
                self._dispatch()


def _status(name: str, link: Link | None, restarts: int) -> WorkerStatus:
    if link is None:
        return WorkerStatus(name, alive=False, restarts=restarts)
    return WorkerStatus(name, link.ready, link.images, link.loaded, link.memory_bytes, restarts)
