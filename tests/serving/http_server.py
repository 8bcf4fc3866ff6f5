"""A real server on a free loopback port, over pipelines of numpy functions, which the tests of HTTP ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn

from runtimes.bundle.tensors import ShapeRange
from runtimes.pipeline.diffusion import Pipeline
from runtimes.schedulers import SCHEDULERS
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.engine.contract import Pool
from runtimes.serving.engine.engine import Engine
from runtimes.serving.http.app import create_app
from runtimes.serving.http.connections import UVICORN
from runtimes.serving.http.keys import KeyRing, Signer
from runtimes.serving.http.observed import Metrics
from runtimes.serving.http.service import Service
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.dispatcher import Dispatcher
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.result_cache import ResultCache
from tests.runtimes.fakes import DDIM, FACTS, FakeSession, fake_sessions, tokenize

SIDES = ShapeRange(16, 32, 64), 8
MODEL = ServedModel(
    name="fake", folder=Path("/nowhere/secret/fake"), digest="f" * 64, created=1_700_000_000,
    family="stable-diffusion", precision="fp32", height=32, width=32, heights=SIDES, widths=SIDES,
    schedulers=tuple(name for name in SCHEDULERS if not name.startswith("edm")), edits=True, inpaints=False,
    takes_prompt=True, has_safety_checker=False, exact=True, bytes=1, presets={"standard": {}})


def slow_pipeline(seconds: float = 0.0, gate: threading.Event | None = None) -> Pipeline:
    """Numpy functions, of which the denoiser takes `seconds` more, and waits for `gate`."""
    sessions: dict[str, FakeSession] = fake_sessions(batch=16)
    unet = sessions["unet"].function

    def slowed(**feeds: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        if gate is not None:
            assert gate.wait(60)
        return unet(**feeds)

    sessions["unet"].function = slowed
    return Pipeline(sessions, FACTS, DDIM, tokenize)


@dataclass
class Serving:
    """A server that runs, and clients of it."""

    port: int
    service: Service
    server: uvicorn.Server
    key: str = ""
    clients: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with a key; by default that of the first owner."""
        key = self.key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)  # certificates take 0.3 s
        self.clients.append(client)
        return client

    @cached_property
    def anybody(self) -> httpx.Client:
        """A client without a key."""
        return self.client("")

    def openai(self, **options: Any) -> openai.OpenAI:
        values: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": self.key or "none", "max_retries": 0}
        self.clients.append(client := openai.OpenAI(**(values | options)))
        return client


@contextmanager
def running_app(app: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    """uvicorn with our settings, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **UVICORN))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until and thread.is_alive(), "the server does not start"
        time.sleep(0.005)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def serving(folder: Path, pipelines: Mapping[str, Pipeline] | Pool | None = None, *,
            keys: Mapping[str, str] | None = None, cache: ResultCache | None = None,
            models: Mapping[str, ServedModel] | None = None,
            change: Callable[[Service], None] = lambda service: None, most_waiting: int = 256, most_images: int = 8,
            **options: Any) -> Iterator[Serving]:
    """A server over numpy pipelines, or over a pool of another kind.

    Args:
        folder: of its state.
        pipelines: by name; one quick one by default.
        keys: owner to API key; the first is that of the clients.
        cache: of finished images.
        models: what the catalog says of the pipelines.
        change: called with the service before it starts.
        most_waiting, most_images: of the engine.
        options: of `ServerOptions`.
    """
    if pipelines is None:
        pipelines = {"fake": slow_pipeline()}
    metrics = Metrics()
    pool: Any = pipelines if not isinstance(pipelines, Mapping) else Engine(
        pipelines, most_waiting=most_waiting, most_images=most_images, watch=metrics.observe)
    names = list(pipelines) if isinstance(pipelines, Mapping) else ["fake"]
    catalog = models or {name: replace(MODEL, name=name) for name in names}
    if isinstance(pool, Engine):
        for name, model in catalog.items():
            if (loaded := pool.models.find(name)) is not None:
                loaded.digest = model.digest  # pipelines that are given have none
    with JobStore(folder) as store:
        service = Service(catalog, pool, store, ServerOptions(**options), Signer.of(folder), keys=KeyRing(keys),
                          metrics=metrics, cache=cache)
        change(service)
        try:
            with Dispatcher(store, pool, catalog, cache=cache, watch=metrics.observe), \
                    running_app(create_app(service)) as (server, port):
                found = Serving(port, service, server, next(iter((keys or {}).values()), ""))
                try:
                    yield found
                finally:
                    for client in found.clients:
                        client.close()
        finally:
            pool.close(drain=False)


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Until it is so; bounded."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.005)
