"""`Front`: what takes HTTP requests on a Ray cluster: the whole application, and a dispatcher of its own.

Leases in the one store see to it that several never run the same job.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.exceptions import ReplicaUnavailableError

from runtimes.errors import UnavailableError
from runtimes.serving.cluster.cluster_settings import APPLICATION, ClusterSettings, Offer
from runtimes.serving.cluster.engine_replica import Call, Message
from runtimes.serving.cluster.ray_pool import RayPool, Stream
from runtimes.serving.cluster.state_service import RemoteStore, state_actor
from runtimes.serving.engine.contract import WorkerStatus
from runtimes.serving.http.app import create_app
from runtimes.serving.http.keys import KeyRing, Signer
from runtimes.serving.http.service import Service
from runtimes.serving.logs import set_up_logs
from runtimes.serving.state.dispatcher import Dispatcher, Writing
from runtimes.serving.state.result_cache import ResultCache
from runtimes.system.byte_sizes import parse_bytes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)
ENGINES, FRONT = "engines", "front"
# What Ray raises where a replica, its process or its node ended; a request is cancelled by Ray alone when a replica
# that is stopped does not end it in time.
LOST: tuple[type[BaseException], ...] = (
    ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError, ray.exceptions.LocalRayletDiedError, ray.exceptions.TaskCancelledError,
    ReplicaUnavailableError)


class Front:
    """What Ray Serve runs as the deployment "front"."""

    async def __init__(self, engines: DeploymentHandle[Any], settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Put the parts together; nothing is served before `reconfigure` brings the bundles."""
        self._settings = ClusterSettings.from_json(settings)
        set_up_logs(self._settings.server.log_format)
        options, most_sent = self._settings.server, self._settings.most * self._settings.engine_room
        self._offer = Offer(self._settings)
        self._dispatcher: Dispatcher | None = None
        self._cache = ResultCache(parse_bytes(options.cache_bytes, "--cache-bytes", least=0))
        store = RemoteStore(await asyncio.to_thread(state_actor, self._settings))
        signer = Signer(await asyncio.to_thread(store.secret), hours=options.keep_hours)
        self._pool = RayPool(streamed(engines), self._offer, lost=LOST, most_waiting=options.queue,
                             most_sent=most_sent, workers=engine_replicas)
        self._service = Service(
            catalog=self._offer, pool=self._pool, store=store, options=options, signer=signer,
            keys=KeyRing.read(options.api_key_file) if options.api_key_file else KeyRing(), state="starting",
            cache=self._cache)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the application after `__init__`."""
        return create_app(self._service)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Offer these bundles from now on. Jobs are taken from the first time on: none is refused for want of them."""
        await asyncio.to_thread(self._offer.change, config)
        if self._dispatcher is None:
            options, fronts = self._settings.server, self._settings.fronts
            self._dispatcher = Dispatcher(
                self._service.store, self._pool, self._offer, cache=self._cache,
                writing=Writing(options.safety, options.metadata,
                                most_jobs=max(2, self._settings.most * self._settings.engine_room // fronts)))
        self._service.state = "serving"

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces the replica where this raises or does not answer."""
        if not self._pool.alive:
            raise UnavailableError("the pool's thread has ended", where="front")

    async def __del__(self) -> None:
        """Ray calls it when no HTTP request is under way any more: what this front has of jobs is finished or put
        back."""
        if (service := getattr(self, "_service", None)) is None:
            return
        service.drain()
        if self._dispatcher is not None:
            await asyncio.to_thread(self._dispatcher.stop, self._settings.drain_seconds / 2)
        await asyncio.to_thread(self._pool.close, drain=False)


def streamed(engines: DeploymentHandle[Any]) -> Stream:
    """Send requests to replicas by Ray Serve's handle of them."""
    handle: Any = engines.options(stream=True)

    async def stream(call: Call) -> AsyncIterator[Message]:
        response = handle.generate.remote(call)
        try:
            async for message in response:
                yield message
        finally:
            response.cancel()

    return stream


def engine_replicas() -> tuple[WorkerStatus, ...]:
    """The engines as Ray Serve's controller knows them. Blocks for a round trip."""
    application = serve.status().applications.get(APPLICATION)
    deployment = application.deployments.get(ENGINES) if application is not None else None
    states = deployment.replica_states if deployment is not None else {}
    return tuple(WorkerStatus(f"engine-{state.lower()}-{number}", alive=state in ("RUNNING", "UPDATING"))
                 for state, count in states.items() for number in range(count))
