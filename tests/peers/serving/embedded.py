"""Our pipeline within a small FastAPI application of the same routes: what batching alone is worth.

    python -m tests.peers.serving.embedded whole|engine BUNDLE PORT THREADS

`whole` batches whole requests, as servers do that run a batch from its first step to its last: what waits and agrees
with the oldest one in its steps, up to 8, goes together, and all of it is answered at the end. `engine` is
`runtimes.serving.Engine` in the application's own process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

import runtimes
from runtimes.inputs.request import Request

MOST = 8


class Body(BaseModel):
    """What the load asks; further fields are without effect."""

    prompt: str
    num_inference_steps: int = 25
    seed: int = 0


class WholeRequests:
    """Batches of requests of the same steps, one batch after another, the oldest request's first."""

    def __init__(self, run: Callable[[list[Request]], Sequence[Any]], most: int = MOST) -> None:
        """Start the thread that runs them.

        Args:
            run: the images of a batch.
            most: requests of one.
        """
        self._run, self._most = run, most
        self._waiting: list[tuple[Request, Future[Any]]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request: Request) -> Future[Any]:
        """The image to come."""
        future: Future[Any] = Future()
        with self._changed:
            self._waiting.append((request, future))
            self._changed.notify()
        return future

    def _take(self) -> list[tuple[Request, Future[Any]]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            steps = self._waiting[0][0].steps
            batch = [pair for pair in self._waiting if pair[0].steps == steps][:self._most]
            self._waiting = [pair for pair in self._waiting if pair not in batch]
            return batch

    def _work(self) -> None:
        while True:
            batch = self._take()
            try:
                images = self._run([request for request, _ in batch])
                for (_, future), image in zip(batch, images, strict=True):
                    future.set_result(image)
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)


def generator_of(kind: str, bundle: str, threads: int) -> Callable[[Request], Awaitable[Image.Image]]:
    """Makes one image, batched as its name says."""
    pipeline = runtimes.load(bundle, threads=threads)
    if kind == "whole":
        whole = WholeRequests(lambda batch: pipeline(
            [str(request.prompt) for request in batch], steps=batch[0].steps, seed=[request.seed for request in batch]))
        return lambda request: asyncio.wrap_future(whole.submit(request))
    from runtimes.serving.engine.engine import Engine

    engine = Engine({"model": pipeline})

    async def generate(request: Request) -> Image.Image:
        image: Image.Image = (await engine.submit(request, "model")).images[0]
        return image

    return generate


def encoded(image: Image.Image) -> dict[str, Any]:
    """The answer of one image."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}


def application(kind: str, bundle: str, threads: int) -> FastAPI:
    """The server of one bundle."""
    generate, app = generator_of(kind, bundle, threads), FastAPI()

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    async def answer(body: Body) -> dict[str, Any]:
        image = await generate(Request(body.prompt, steps=body.num_inference_steps, seed=body.seed))
        return await asyncio.to_thread(encoded, image)

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1], sys.argv[2], int(sys.argv[4])), host="127.0.0.1", port=int(sys.argv[3]),
                log_level="warning")
