"""`Lanes`: what runs now, by what may share a call, and which of them goes next."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from runtimes.serving.engine.sources import Loaded

if TYPE_CHECKING:
    from runtimes.pipeline.job import Job
    from runtimes.serving.engine.ticket import Ticket


@dataclass(eq=False)
class Running:
    """A request that is being denoised.

    Attributes:
        previews: after which steps it shows one.
        work_seconds: its share of the time that the device worked.
        began: when it was admitted.
    """

    ticket: Ticket
    job: Job
    loaded: Loaded
    previews: frozenset[int]
    work_seconds: float = 0.0
    began: float = field(default_factory=monotonic)

    @property
    def key(self) -> tuple[Any, ...]:
        """What requests have in common that may share calls: the bundle and the shape of latents."""
        return id(self.loaded), self.job.latents.shape[1:]


@dataclass(eq=False)
class Lane:
    """Requests of one bundle and one size.

    Attributes:
        spent: seconds that it had of the device, counted from where the others stood when it began.
    """

    loaded: Loaded
    members: list[Running] = field(default_factory=list)
    spent: float = 0.0

    @property
    def images(self) -> int:
        """That its members ask for together."""
        return sum(one.ticket.images for one in self.members)


class Lanes:
    """All that runs. Each lane gets the same share of the device's time: images of a small model or size are not held
    up by those of a large one more than by their like. The engine's thread changes it, any may look."""

    def __init__(self) -> None:
        """Nothing runs."""
        self._lanes: dict[tuple[Any, ...], Lane] = {}
        self._keys: dict[int, tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def running(self) -> list[Running]:
        """All requests that run."""
        with self._lock:
            return [one for lane in self._lanes.values() for one in lane.members]

    def add(self, one: Running) -> None:
        """It joins those that it shares calls with."""
        with self._lock:
            key = one.key
            if key not in self._lanes:
                # A lane that begins is owed nothing of the time before it.
                spent = min((lane.spent for lane in self._lanes.values()), default=0.0)
                self._lanes[key] = Lane(one.loaded, spent=spent)
            self._lanes[key].members.append(one)
            self._keys[id(one)] = key

    def remove(self, one: Running) -> None:
        """It runs no more."""
        with self._lock:
            key = self._keys.pop(id(one))
            lane = self._lanes[key]
            lane.members.remove(one)
            if not lane.members:
                del self._lanes[key]

    def next(self) -> Lane | None:
        """The lane that had the least time; None if nothing runs."""
        with self._lock:
            return min(self._lanes.values(), key=lambda lane: lane.spent, default=None)
