"""Runs an order while its client waits: cache, pool, image files; ends it when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from runtimes.errors import DeployError
from runtimes.serving.engine.contract import Generated
from runtimes.serving.engine.ticket import Progress, Ticket
from runtimes.serving.http.failures import reason_of
from runtimes.serving.http.service import Service
from runtimes.serving.state.order import Order
from runtimes.serving.state.written_images import WrittenImage, encoded, written

PREVIEW_COMPRESSION = 80
KEEP_ALIVE_SECONDS = 15.0


class ClientGone(Exception):
    """The client closed the connection before its answer was there."""


@dataclass(frozen=True)
class Result:
    """The images of an order, as files.

    Attributes:
        images: as files.
        digest: of the bundle that made them.
        judged: whether a safety checker looked at them.
        cached: whether they were in the cache.
    """

    images: list[WrittenImage]
    digest: str
    judged: bool
    cached: bool = False


class Run:
    """One order under way in the pool, or found in the cache."""

    def __init__(self, service: Service, order: Order) -> None:
        """Prepare; `start` begins."""
        self.service, self.order = service, order
        self._judge = service.options.safety != "off" and service.catalog[order.model].has_safety_checker
        self._ticket: Ticket | None = None
        self._cached: Result | None = None
        self._events: asyncio.Queue[Progress | None] = asyncio.Queue()
        self._preview: NDArray[np.uint8] | None = None

    async def start(self, previews: int = 0) -> None:
        """Look into the cache, else let the order wait for its turn.

        Args:
            previews: how many of each image `previews` gives.

        Raises:
            DeployError: it is not accepted.
        """
        self.service.check_open()
        digest = self.service.catalog[self.order.model].digest
        if (cache := self.service.cache) is not None and cache.most_bytes:
            found = await asyncio.to_thread(cache.get, self.order.key(digest))
            self.service.metrics.cache.labels("miss" if found is None else "hit").inc()
            if found is not None:
                self._cached = Result(list(found), digest, self._judge, cached=True)
                return
        loop = asyncio.get_running_loop()
        try:
            self._ticket = await asyncio.to_thread(self._submitted, loop, previews)
        except DeployError as error:
            self.service.metrics.failed(reason_of(error))
            raise

    def _submitted(self, loop: asyncio.AbstractEventLoop, previews: int) -> Ticket:
        def put(event: Progress | None) -> None:
            if event is not None and event.preview is not None:
                self._preview = event.preview
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        ticket = self.service.pool.submit(self.order.request(), self.order.model, previews=previews, judge=self._judge)
        ticket.watch(put)
        return ticket

    async def previews(self) -> AsyncIterator[NDArray[np.uint8] | None]:
        """Previews as they come, (B, h, w, 3) uint8 pixels, and None now and then while nothing happens; ends with
        the order, however that ends."""
        if self._ticket is None:
            return
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
                continue
            if event is None:
                return
            if event.preview is not None:
                yield event.preview

    async def result(self) -> Result:
        """The images, once they are there.

        Raises:
            DeployError: why there are none.
        """
        if self._cached is not None:
            return self._cached
        assert self._ticket is not None, "start() comes first"
        try:
            generated = await self._ticket
        except DeployError as error:
            self.service.metrics.failed(reason_of(error))
            raise
        self.service.metrics.served(self._ticket.request)
        return await asyncio.to_thread(self._written, generated)

    def progress(self) -> tuple[int, int, NDArray[np.uint8] | None]:
        """Finished steps, all of them, and the last preview, (B, h, w, 3) uint8 pixels."""
        now = None if self._ticket is None else self._ticket.progress
        return (0, 0, None) if now is None else (now.index, now.total, self._preview)

    def seconds_left(self) -> float:
        """As its steps took until now; 0 before the first."""
        step, total, _ = self.progress()
        began = None if self._ticket is None else self._ticket.started
        return 0.0 if not step or began is None else (monotonic() - began) / step * (total - step)

    def cancel(self) -> None:
        """Nobody waits for it any more. Without effect once it has ended."""
        if self._ticket is not None and not self._ticket.future.done():
            self._ticket.cancel()

    def _written(self, generated: Generated) -> Result:
        options = self.service.options
        if not generated.digest:  # of an engine over pipelines that it was given, which knows no bundles
            generated = replace(generated, digest=self.service.catalog[self.order.model].digest)
        images = written(generated, self.order, safety=options.safety, metadata=options.metadata)
        if self.service.cache is not None:
            self.service.cache.put(self.order.key(generated.digest), tuple(images))
        return Result(images, generated.digest, self._judge and bool(generated.flagged))


async def result_while_connected(request: Request, run: Run) -> Result:
    """The images of a run, which is cancelled when the client goes away first.

    Raises:
        ClientGone: it did.
        DeployError: why there are no images.
    """
    done = asyncio.ensure_future(run.result())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientGone
    finally:
        run.cancel()
        gone.cancel()
        done.cancel()
        await asyncio.gather(done, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns once the client is gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def preview_files(preview: NDArray[np.uint8], width: int, height: int, kind: str) -> list[bytes]:
    """Previews as image files of full size.

    Args:
        preview: (B, h, w, 3) uint8 pixels.
        width, height: in pixels.
        kind: "png", "jpeg" or "webp".
    """
    from PIL import Image

    images = (Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC) for colours in preview)
    return [encoded(image, kind, PREVIEW_COMPRESSION) for image in images]
