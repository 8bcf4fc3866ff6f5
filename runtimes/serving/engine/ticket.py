"""`Ticket`: one request within an engine, as its client holds it: progress, cancel, result; for threads and asyncio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from runtimes.inputs.request import Request
    from runtimes.serving.engine.results import Generated

logger = logging.getLogger(__name__)
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Progress:
    """A request went on by a step.

    Attributes:
        index: steps that are finished, 1 to total.
        total: of all.
        preview: (B, H/f, W/f, 3) uint8 of what the latents show, or None where none was asked for.
    """

    index: int
    total: int
    preview: NDArray[np.uint8] | None = None


class Ticket:
    """One request that an engine accepted. Awaitable; any thread may read and cancel it.

    Attributes:
        request: with its seeds resolved.
        model: name of the bundle.
        priority: higher ones run first.
        deadline: of `time.monotonic`, after which it is not started any more; None for none.
        created, started, ended: of `time.monotonic`, None before.
        previews: how many its `Progress` shows, evenly over the steps.
        judge: whether the bundle's safety checker looks at the images.
        attempts: how often a worker died with it.
        number: order of arrival.
    """

    def __init__(self, request: Request, model: str, *, priority: int = 0, deadline: float | None = None,
                 previews: int = 0, judge: bool = False, on_cancel: Callable[[], None] = lambda: None) -> None:
        """Take a number."""
        self.request, self.model, self.priority, self.deadline = request, model, priority, deadline
        self.previews, self.judge, self._on_cancel, self.attempts = previews, judge, on_cancel, 0
        self.number, self.created = next(_NUMBERS), monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.progress: Progress | None = None
        self.cancelled = False
        self.future: Future[Generated] = Future()
        self.future.set_running_or_notify_cancel()  # a task that awaits it and is cancelled must not cancel this, too
        self._watchers: list[_Watcher] = []
        self._steps: list[Progress] = []
        self._lock = threading.Lock()

    @property
    def images(self) -> int:
        """How many it asks for."""
        return self.request.count

    @property
    def status(self) -> str:
        """queued, running, completed, failed or cancelled."""
        if not self.future.done():
            return "queued" if self.started is None else "running"
        if self.cancelled:
            return "cancelled"
        return "failed" if self.future.exception() is not None else "completed"

    def result(self, timeout: float | None = None) -> Generated:
        """The images and what belongs to them, once they are there.

        Raises:
            DeployError: why there are none.
            TimeoutError: not within so many seconds.
        """
        return self.future.result(timeout)

    def __await__(self) -> Generator[Any, None, Generated]:
        return asyncio.wrap_future(self.future).__await__()

    def cancel(self) -> None:
        """End it: at once while it waits, else at its next step."""
        self.cancelled = True
        self._on_cancel()

    def watch(self, watcher: Callable[[Progress | None], None]) -> None:
        """Call `watcher` with every step, those so far now, later ones in the engine's thread, and None at the end.

        After a worker died, the steps begin again.
        """
        with self._lock:
            added = _Watcher(watcher, deque(self._steps))
            if self.future.done():
                added.events.append(None)
            else:
                self._watchers.append(added)
        self._deliver([added])

    async def events(self) -> AsyncIterator[Progress]:
        """Every step; ends with the request, however that ends."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Progress | None]()

        def put(event: Progress | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        self.watch(put)
        while (event := await queue.get()) is not None:
            yield event

    # ---- the engine's side ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """It runs now."""
        self.started = monotonic()

    def restart(self) -> None:
        """It waits again, since the worker that ran it died."""
        with self._lock:
            self.started, self.progress, self._steps = None, None, []
        self.attempts += 1

    def step(self, progress: Progress) -> None:
        """It went on."""
        with self._lock:
            self.progress = progress
            self._steps.append(progress)
            watchers = list(self._watchers)
            for watcher in watchers:
                watcher.events.append(progress)
        self._deliver(watchers)

    def end(self, result: Generated | None = None, error: BaseException | None = None) -> bool:
        """It has images, or an error.

        Returns:
            whether it had not ended before; only the first end counts.
        """
        with self._lock:
            if self.future.done():
                return False
            self.ended = monotonic()
            watchers, self._watchers = self._watchers, []
            if error is not None:
                self.future.set_exception(error)
            else:
                assert result is not None
                self.future.set_result(result)
            for watcher in watchers:
                watcher.events.append(None)
        self._deliver(watchers)
        return True

    def _deliver(self, watchers: list[_Watcher]) -> None:
        """Call watchers, without any lock; what comes meanwhile from another thread is delivered by the one that calls,
        so that each watcher has the events one after the other."""
        for watcher in watchers:
            while True:
                with self._lock:
                    if watcher.busy or not watcher.events:
                        break
                    watcher.busy, event = True, watcher.events.popleft()
                try:
                    watcher.call(event)
                except Exception:  # as that its event loop is closed: no fault of the engine
                    logger.exception("a watcher of a request failed")
                finally:
                    with self._lock:
                        watcher.busy = False


@dataclass(eq=False)
class _Watcher:
    """Who is called, and what it has not heard yet."""

    call: Callable[[Progress | None], None]
    events: deque[Progress | None]
    busy: bool = False
