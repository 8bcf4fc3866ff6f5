"""An engine at the end of a connection: it does what a server sends, and reports steps, previews, images and memory."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.serving.engine.engine import COMPANY_SECONDS, Engine
from runtimes.serving.engine.models import Models, opener, resident_bytes
from runtimes.serving.engine.sources import Offered, Steppable
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.workers.channel import Channel, Message, ProtocolError
from runtimes.serving.workers.encoded import decoded_request, encoded_error, encoded_result

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
MOST_WAITING = 4096  # the server holds the queue; what it sends is taken


@dataclass(frozen=True)
class Offer:
    """A bundle that requests may name: see `engine.sources.Offered`."""

    folder: Path
    digest: str
    bytes: int

    @classmethod
    def of(cls, offered: Offered) -> Offer:
        """What a worker must know of it."""
        return cls(offered.folder, offered.digest, offered.bytes)

    def to_json(self) -> list[Any]:
        """For a message."""
        return [str(self.folder), self.digest, self.bytes]

    @classmethod
    def from_json(cls, values: Any) -> Offer:
        """What `to_json` wrote.

        Raises:
            ProtocolError: it is not.
        """
        match values:
            case [str(folder), str(digest), int(size)]:
                return cls(Path(folder), digest, size)
        raise ProtocolError(f"{values!r:.80} is no bundle")


def offers_of(message: Message) -> dict[str, Offer]:
    """The bundles that a message names."""
    return {str(name): Offer.from_json(one) for name, one in message.get("bundles", dict).items()}


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker runs.

    Attributes:
        name: of the worker.
        device: as `runtimes.load` takes it.
        cores: that the process is kept on; empty where it may use any.
        threads: of the CPU inside one operator; 0 for all cores.
        batch: images that are denoised side by side.
        most_bytes: that loaded bundles may take; 0 for no limit.
        deterministic: the same bytes in any company.
        company_seconds: how long the first request of an idle worker waits for others.
        heartbeat_seconds: between two signs of life.
        pipelines: `MODULE:FUNCTION` that gives the function that loads a bundle, for tests; "" for `runtimes.load`.
        log_format: of its log's lines: "text" or "json".
    """

    name: str = ""
    device: str = "cpu"
    cores: tuple[int, ...] = ()
    threads: int = 0
    batch: int = 8
    most_bytes: int = 0
    deterministic: bool = False
    company_seconds: float = COMPANY_SECONDS
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    pipelines: str = ""
    log_format: str = "text"

    @classmethod
    def from_message(cls, message: Message) -> WorkerOptions:
        """What `dataclasses.asdict` made of it."""
        fields = dict(message.get("options", dict))
        fields["cores"] = tuple(fields["cores"])
        return cls(**fields)

    def opened(self) -> Callable[[Offered], Steppable]:
        """How bundles are loaded."""
        if not self.pipelines:
            return opener(self.device, self.threads, deterministic=self.deterministic)
        import importlib

        module, _, name = self.pipelines.partition(":")
        found: Callable[[Offered], Steppable] = getattr(importlib.import_module(module), name)
        return found


class ConnectedEngine:
    """The engine of one worker, and its connection to the server.

    Attributes:
        offers: bundles by name, as the server or this machine's catalog has them now; may be changed.
    """

    def __init__(self, channel: Channel, options: WorkerOptions, offers: dict[str, Offer],
                 models: Models | None = None) -> None:
        """Start the engine, and the threads that send and show signs of life.

        Args:
            channel: to the server.
            options: how to run.
            offers: bundles by name.
            models: that were loaded for an earlier connection.
        """
        self.channel, self.options, self.offers = channel, options, offers
        self._tickets: dict[int, Ticket] = {}
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._ended, self._saying = threading.Event(), threading.Lock()
        self.models = models or loaded_by(options, offers)
        self.engine = Engine(self.models, most_waiting=MOST_WAITING, most_images=options.batch,
                             company_seconds=options.company_seconds)
        self._wake = self.models.on_change
        self.models.on_change = self._changed
        self._sender = threading.Thread(target=self._send, name="send", daemon=True)
        self._sender.start()
        self.say(Message("hello", {"name": options.name, "capacity": options.batch, "digests": self.digests()}))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def digests(self) -> dict[str, str]:
        """Of the bundles that it can run, by name."""
        return {name: offer.digest for name, offer in self.offers.items()}

    def say(self, message: Message) -> None:
        """Send a message after those before it, without waiting."""
        self._outbox.put(message)

    def run(self) -> None:
        """Do what the server says, until it says close or is gone; what runs then ends.

        Raises:
            OSError, EOFError: the server is gone.
            ProtocolError: it is none of ours.
        """
        drain = False
        try:
            while (message := self.channel.receive()).kind != "close":
                self._obey(message)
            drain = message.get("drain", bool)
        finally:
            self.engine.close(drain=drain)
            self._ended.set()
            self._outbox.put(None)
            self._sender.join(10)
            self.channel.release()

    def _obey(self, message: Message) -> None:
        match message.kind:
            case "request":
                self._accept(message)
            case "cancel":
                if (ticket := self._tickets.get(message.get("id", int))) is not None:
                    ticket.cancel()
            case "bundles":
                self.offers.update(offers_of(message))
                self._changed()
            case "load":
                self.models.want(message.get("model", str))
            case "refused":
                raise ProtocolError(message.get("reason", str))
            case kind:
                raise ProtocolError(f"{kind!r:.60} is nothing that a worker knows")

    def _accept(self, message: Message) -> None:
        number, model = message.get("id", int), message.get("model", str)
        seconds = None if message.fields.get("deadline_seconds") is None else message.get("deadline_seconds", float)
        try:
            request = decoded_request(message.get("request", dict), message.arrays)
            ticket = self.engine.submit(request, model, previews=message.get("previews", int),
                                        judge=message.get("judge", bool), deadline_seconds=seconds)
        except Exception as error:
            self.say(Message("failed", {"id": number, **encoded_error(error)}))
            return
        self._tickets[number] = ticket
        ticket.watch(lambda progress: self._report(number, ticket, progress))

    def _report(self, number: int, ticket: Ticket, progress: Progress | None) -> None:
        """In the engine's thread, after every step and at the end."""
        if progress is not None:
            self.say(Message("step", {"id": number, "index": progress.index, "total": progress.total},
                             [] if progress.preview is None else [progress.preview]))
            return
        self._tickets.pop(number, None)
        error = ticket.future.exception()
        if error is not None:
            self.say(Message("failed", {"id": number, **encoded_error(error)}))
            return
        fields, arrays = encoded_result(ticket.result())
        self.say(Message("done", {"id": number, **fields}, arrays))

    def _changed(self) -> None:
        self._wake()
        self._say_status()

    def _say_status(self) -> None:
        with self._saying:  # the last one that is sent is the last one that is true
            self.say(Message("status", {"loaded": [one.name for one in self.models.loaded()],
                                        "memory_bytes": resident_bytes(), "busy_seconds": self.engine.busy_seconds}))

    def _beat(self) -> None:
        while not self._ended.wait(self.options.heartbeat_seconds):
            self._say_status()

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.channel.send(message)
            except OSError:
                break
        self.channel.close()


def loaded_by(options: WorkerOptions, offers: Mapping[str, Offer]) -> Models:
    """Bundles as a worker loads them; nothing is loaded yet. The process is kept on its cores from now on."""
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    return Models(offers, most_bytes=options.most_bytes or None, opened=options.opened())
