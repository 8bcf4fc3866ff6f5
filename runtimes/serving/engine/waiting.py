"""The bounded queue in front of an engine: priorities that age, deadlines, and when a refused client may come again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection
from time import monotonic

from runtimes.errors import CancelledError, UnavailableError
from runtimes.serving.engine.ticket import Ticket

AGING_SECONDS = 10.0  # waited, they count as one priority
SMOOTHING = 0.2


class QueueFullError(UnavailableError):
    """The queue holds as many requests as it may.

    Attributes:
        retry_after: seconds until a place should be free, from the measured rate.
    """

    def __init__(self, length: int, retry_after: float) -> None:
        """Say when to come again."""
        super().__init__(f"{length} requests are waiting", where="queue",
                         fix=f"ask again in {math.ceil(retry_after)} seconds")
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (0, self.retry_after)


class Waiting:
    """Tickets that no worker has taken yet. Safe to share between threads.

    The next is the one of the highest priority, to which every ten seconds of waiting add one: no request waits for
    ever, however many of higher priority come. Before all others are those that a worker died with.
    """

    def __init__(self, most: int, clock: Callable[[], float] = monotonic) -> None:
        """Hold at most `most` tickets."""
        self._most, self._clock = most, clock
        self._tickets: list[Ticket] = []
        self._changed = threading.Condition()
        self._changes = 0
        self._seconds_each = 1.0  # of service for one image, smoothed

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def changes(self) -> int:
        """Counts what `wait` waits for."""
        return self._changes

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait.

        Raises:
            QueueFullError: as many wait as may.
        """
        with self._changed:
            if len(self._tickets) >= self._most:
                raise QueueFullError(len(self._tickets), self.retry_after())
            self._tickets.append(ticket)
            self._wake()

    def put_back(self, ticket: Ticket) -> None:
        """Let a ticket wait again that was taken before, however many wait."""
        with self._changed:
            self._tickets.append(ticket)
            self._wake()

    def take(self, models: Collection[str], images: int) -> list[Ticket]:
        """The next tickets for a worker.

        A ticket of more images than there is room for is not overtaken by later ones: it would wait for ever.

        Args:
            models: that the worker may run now.
            images: room that it has; one ticket is given even if it needs more than an empty worker has.
        """
        with self._changed:
            taken: list[Ticket] = []
            for ticket in self._ranked():
                if ticket.model not in models:
                    continue
                if ticket.images > images:
                    break
                taken.append(ticket)
                images -= ticket.images
            self._remove(taken)
            return taken

    def ranked(self) -> list[Ticket]:
        """All that wait, the next one first."""
        with self._changed:
            return self._ranked()

    def first(self, models: Collection[str] | None = None) -> Ticket | None:
        """The ticket whose turn is next, of these models or of all; it stays."""
        return next((ticket for ticket in self.ranked() if models is None or ticket.model in models), None)

    def models(self) -> list[str]:
        """Models that are waited for, in order of the first ticket of each."""
        return list(dict.fromkeys(ticket.model for ticket in self.ranked()))

    def remove(self, ticket: Ticket) -> bool:
        """Take one ticket; False if it does not wait here."""
        with self._changed:
            found = ticket in self._tickets
            self._remove([ticket])
            return found

    def drop_ended(self) -> list[Ticket]:
        """Remove and return tickets that were cancelled or whose deadline has passed."""
        with self._changed:
            now = self._clock()
            ended = [t for t in self._tickets if t.cancelled or (t.deadline is not None and t.deadline < now)]
            if ended:
                self._remove(ended)
            return ended

    def end_those_that_are_late(self) -> None:
        """Drop what `drop_ended` finds, and say so to whoever waits for it."""
        for ticket in self.drop_ended():
            if ticket.cancelled:
                ticket.end(error=CancelledError(0, ticket.request.steps))
            else:
                ticket.end(error=UnavailableError("its deadline passed before its turn", where="queue",
                                                  fix="ask again later, or allow more time"))

    def seconds_to_deadline(self) -> float:
        """Until the next deadline of a ticket; infinite without one."""
        with self._changed:
            return min((t.deadline for t in self._tickets if t.deadline is not None), default=math.inf) - self._clock()

    def drain(self) -> list[Ticket]:
        """Remove and return all."""
        with self._changed:
            left, self._tickets = self._tickets, []
            return left

    def wait(self, seconds: float, since: int) -> None:
        """Until `changes` is not `since`, at most so long: something came, or `wake` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != since, max(seconds, 0))

    def wait_for_images(self, images: int, seconds: float) -> None:
        """Until tickets of so many images wait, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: sum(ticket.images for ticket in self._tickets) >= images, seconds)

    def wake(self) -> None:
        """End every `wait`."""
        with self._changed:
            self._wake()

    def position(self, ticket: Ticket) -> int:
        """How many come before a ticket; 0 for the next and for one that waits no more."""
        ranked = self.ranked()
        return ranked.index(ticket) if ticket in ranked else 0

    def served(self, images: int, seconds: float) -> None:
        """Learn the rate: so many images took so long, the worker being busy."""
        self._seconds_each += SMOOTHING * (seconds / images - self._seconds_each)

    def retry_after(self) -> float:
        """Seconds in which one place of the queue becomes free: what the request that is next needs."""
        first = self.first()
        return max(self._seconds_each * (first.images if first else 1), 1.0)

    def _ranked(self) -> list[Ticket]:
        now = self._clock()
        return sorted(self._tickets, key=lambda ticket: (
            not ticket.attempts, -(ticket.priority + (now - ticket.created) / AGING_SECONDS), ticket.number))

    def _remove(self, gone: list[Ticket]) -> None:
        self._tickets = [ticket for ticket in self._tickets if ticket not in gone]

    def _wake(self) -> None:
        self._changes += 1
        self._changed.notify_all()
