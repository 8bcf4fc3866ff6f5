"""`Link`: one worker as the server sees it, of this machine or another; and which of several a request goes to."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.serving.engine.ticket import Ticket
from runtimes.serving.workers.channel import Channel, Message, ProtocolError
from runtimes.serving.workers.encoded import encoded_request

if TYPE_CHECKING:
    from runtimes.inputs.request import Request

logger = logging.getLogger(__name__)
ALONE_FROM = 2  # deaths of workers after which a request runs by itself: whoever it takes along is innocent


class Owner(Protocol):
    """Who hears what happens to a link, in the link's own threads."""

    def hear(self, link: Link, message: Message) -> None:
        """The worker said something."""

    def unsent(self, link: Link, ticket: Ticket, error: Exception) -> None:
        """A request cannot be sent, by its own fault."""

    def lost(self, link: Link, reason: str) -> None:
        """The connection has ended; called once."""


class Link:
    """A worker: its connection, what it has loaded and what it runs. The pool's lock guards what is written here.

    Attributes:
        ready: whether it has said hello.
        capacity: images that it runs side by side.
        digests: of the bundles that it can run, by name.
        running: what it was given and has not ended.
        loaded: names of the bundles that it has loaded, the one used last at the end.
        began: when it was connected, of `time.monotonic`.
        heard: when it last said anything, of `time.monotonic`.
        busy_seconds: since its call of a network began that runs now, as it last said.
    """

    def __init__(self, name: str, channel: Channel, owner: Owner) -> None:
        """Take over a connection; `start` begins to read.

        Args:
            name: in logs and status.
            channel: to the worker.
            owner: of the link.
        """
        self.name, self.channel, self._owner = name, channel, owner
        self.ready, self.capacity = False, 1
        self.digests: Mapping[str, str] = {}
        self.running: dict[int, Ticket] = {}
        self.loaded: tuple[str, ...] = ()
        self.memory_bytes, self.busy_seconds, self.heard = 0, 0.0, monotonic()
        self._outbox: queue.SimpleQueue[Message | Ticket | None] = queue.SimpleQueue()
        self.began = monotonic()
        self._threads = [threading.Thread(target=self._write, name=f"to {name}", daemon=True),
                         threading.Thread(target=self._read, name=f"from {name}", daemon=True)]

    def start(self) -> None:
        """Read and write from now on."""
        for thread in self._threads:
            thread.start()

    @property
    def images(self) -> int:
        """That run on it."""
        return sum(ticket.images for ticket in self.running.values())

    def has_room(self, ticket: Ticket) -> bool:
        """Whether a request can join what runs: within its capacity, or by itself."""
        if not self.running:
            return True
        if ticket.attempts >= ALONE_FROM or any(other.attempts >= ALONE_FROM for other in self.running.values()):
            return False
        return self.images + ticket.images <= self.capacity

    def give(self, ticket: Ticket) -> None:
        """Let it run a request."""
        self.running[ticket.number] = ticket
        self._outbox.put(ticket)

    def say(self, message: Message) -> None:
        """Send a message after those before it, without waiting."""
        self._outbox.put(message)

    def end(self) -> None:
        """Close the connection; `Owner.lost` follows."""
        self.channel.close()

    def join(self, seconds: float) -> None:
        """Wait until nothing of it runs any more."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(seconds)

    def _write(self) -> None:
        while (item := self._outbox.get()) is not None:
            try:
                self.channel.send(item if isinstance(item, Message) else _asked(item))
            except OSError:
                self.channel.close()
                return
            except Exception as error:  # an image that cannot be sent is a fault of its request
                if isinstance(item, Ticket):
                    self._owner.unsent(self, item, error)
                else:
                    logger.exception("%s: a message could not be sent", self.name)

    def _read(self) -> None:
        reason = "its connection ended"
        try:
            while True:
                message = self.channel.receive()
                self.heard = monotonic()
                self._owner.hear(self, message)
        except ProtocolError as error:
            reason = error.what
        except (OSError, EOFError):
            pass
        except Exception:
            logger.exception("%s: what it said could not be understood", self.name)
            reason = "what it said could not be understood"
        self.channel.close()
        self._outbox.put(None)
        self._threads[0].join()
        self.channel.release()
        self._owner.lost(self, reason)


def _asked(ticket: Ticket) -> Message:
    """A request as a message."""
    fields, arrays = encoded_request(ticket.request)
    seconds = None if ticket.deadline is None else max(ticket.deadline - monotonic(), 0.0)
    return Message("request", {"id": ticket.number, "model": ticket.model, "previews": ticket.previews,
                               "judge": ticket.judge, "deadline_seconds": seconds, "request": fields}, arrays)


def shape_of(request: Request) -> tuple[Any, ...]:
    """What requests of one bundle have in common that may share calls, as far as it shows without the bundle."""
    return request.height, request.width, request.aspect, request.tile, request.image is None


def choose(ticket: Ticket, digest: str, links: Iterable[Link]) -> Link | None:
    """The worker that a request should go to; None where none has room.

    One that has the bundle loaded comes first. Of those one that runs nothing, then one that runs the same size, which
    shares its calls; then the one that runs least.

    Args:
        ticket: the request.
        digest: of the bundle that must run it.
        links: that may be asked.
    """
    def cost(link: Link) -> tuple[bool, bool, int]:
        same = any(other.model == ticket.model and shape_of(other.request) == shape_of(ticket.request)
                   for other in link.running.values())
        return ticket.model not in link.loaded, bool(link.running) and not same, link.images

    fitting = [link for link in links if can_run(link, ticket.model, digest) and link.has_room(ticket)]
    return min(fitting, key=cost, default=None)


def can_run(link: Link, model: str, digest: str) -> bool:
    """Whether a worker has the very bundle."""
    return link.ready and link.digests.get(model) == digest
