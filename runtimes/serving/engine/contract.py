"""What a server asks of whatever runs its requests: the engine of one process, workers in others, a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from runtimes.serving.engine.results import Generated

if TYPE_CHECKING:
    from runtimes.inputs.request import Request
    from runtimes.serving.engine.ticket import Ticket

__all__ = ["Generated", "Pool", "PoolStatus", "WorkerStatus"]


@dataclass(frozen=True)
class WorkerStatus:
    """One worker as it is now.

    Attributes:
        name: "cpu-0", "cuda:1", or how a remote one calls itself.
        alive: whether it takes requests.
        running: images that it denoises now.
        models: names of the bundles that it has loaded, the one used last at the end.
        memory_bytes: of its process.
        restarts: how often it was started again after it died.
    """

    name: str
    alive: bool = True
    running: int = 0
    models: tuple[str, ...] = ()
    memory_bytes: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class PoolStatus:
    """All workers, and the queue before them.

    Attributes:
        waiting, running: requests.
        images_per_second: measured lately; 0 before the first.
    """

    workers: tuple[WorkerStatus, ...] = ()
    waiting: int = 0
    running: int = 0
    images_per_second: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)


class Pool(Protocol):
    """Runs requests: `engine.engine.Engine`, `workers.pool.WorkerPool`, `cluster.ray_pool.RayPool`."""

    def submit(self, request: Request, model: str, *, priority: int = 0, deadline_seconds: float | None = None,
               previews: int = 0, judge: bool = False) -> Ticket:
        """Let a request wait for its turn; its seeds are resolved now.

        Args:
            request: what to generate.
            model: name of a served bundle.
            priority: higher ones run first; ten seconds of waiting make up for one.
            deadline_seconds: from now; a request that was not started by then fails.
            previews: how many previews its `Progress` shows, evenly over the steps, none after the last.
            judge: whether the bundle's safety checker looks at the images.

        Raises:
            InputError: no such model.
            QueueFullError: too many wait.
            UnavailableError: it is shutting down.
        """

    def position(self, ticket: Ticket) -> int:
        """How many come before a ticket; 0 for the next and for one that waits no more."""

    def status(self) -> PoolStatus:
        """Workers and queue as they are now."""

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and end: after all that was accepted, or at once, cancelling it."""
