"""`EngineReplica`: one engine of a Ray cluster. It keeps nothing that is not somewhere else: it may end at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtimes.errors import DeployError, UnavailableError
from runtimes.serving.cluster.cluster_settings import ClusterSettings, Offer
from runtimes.serving.engine.contract import Generated
from runtimes.serving.engine.engine import Engine
from runtimes.serving.engine.models import Models, opener
from runtimes.serving.engine.ticket import Progress
from runtimes.system.byte_sizes import parse_bytes

if TYPE_CHECKING:
    from runtimes.inputs.request import Request

logger = logging.getLogger(__name__)
STUCK_SECONDS = 600.0  # one call of a network: after that the replica is replaced


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica.

    Attributes:
        request: with its seeds resolved.
        model: name of the bundle.
        priority: as `Pool.submit` has it; it orders what waits within the replica.
        deadline_seconds: from now until it must have been started; None for no end.
        previews: how many are sent.
        judge: whether the safety checker looks at the images.
    """

    request: Request
    model: str
    priority: int = 0
    deadline_seconds: float | None = None
    previews: int = 0
    judge: bool = False


Message = Progress | Generated | DeployError


class EngineReplica:
    """What Ray Serve runs as the deployment "engines"."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Start an engine without bundles: `reconfigure` brings them before the first request."""
        self._settings = ClusterSettings.from_json(settings)
        server = self._settings.server
        self._offer = Offer(self._settings)
        threads = max(1, int(self._settings.engine_cpus))
        most = parse_bytes(server.memory, "--memory") if server.memory else None
        self._models = Models(self._offer, most_bytes=most, opened=opener(self._settings.device, threads,
                                                                          deterministic=server.deterministic))
        # Ray sends no more than `engine_room`; the engine's own queue is never full.
        self._engine = Engine(self._models, most_waiting=4 * self._settings.engine_room, most_images=server.batch)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Offer these bundles from now on, and load them; what runs on others finishes there.

        Raises:
            DeployError: one cannot be offered or loaded. The others before it stay.
        """
        await asyncio.to_thread(self._offer.change, config)
        for name in self._offer:
            while await asyncio.to_thread(self._models.find, name) is None:
                await asyncio.sleep(0.05)

    async def generate(self, call: Call) -> AsyncIterator[Message]:
        """Every step, and in the end the images, or the error as a value: Ray would wrap one that is raised."""
        try:
            ticket = self._engine.submit(call.request, call.model, priority=call.priority, judge=call.judge,
                                         deadline_seconds=call.deadline_seconds, previews=call.previews)
        except DeployError as error:
            yield error
            return
        try:
            async for progress in ticket.events():
                yield progress
            try:
                yield await ticket
            except DeployError as error:
                yield error
        finally:  # also where the caller went away, which ends this generator
            if not ticket.future.done():
                ticket.cancel()

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces the replica where this raises or does not answer."""
        if not self._engine.status().workers[0].alive:
            raise UnavailableError("the engine's thread has ended", where="engine")
        if self._engine.busy_seconds > STUCK_SECONDS:
            raise UnavailableError(f"one step takes {self._engine.busy_seconds:.0f} s", where="engine")

    async def __del__(self) -> None:
        """Ray calls it when nothing is under way any more."""
        if (engine := getattr(self, "_engine", None)) is not None:
            await asyncio.to_thread(engine.close)
            await asyncio.to_thread(self._models.close)
