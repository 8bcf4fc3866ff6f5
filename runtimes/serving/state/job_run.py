"""`JobRun`: one job that this server has claimed, from its submission to a pool until the store has its end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from PIL import Image

from runtimes.errors import CancelledError, DeployError, InputError, UnavailableError
from runtimes.serving.state.store import QUEUED, RUNNING, JobProgress
from runtimes.serving.state.written_images import encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtimes.serving.engine.ticket import Progress, Ticket
    from runtimes.serving.state.order import Order
    from runtimes.serving.state.store import StoredJob

AGAIN, BACK, END = "again", "back", "end"  # what becomes of a job whose ticket has ended without images


class JobRun:
    """A claimed job. Its ticket's thread notes steps; the dispatcher's reads them.

    Attributes:
        job: as it was claimed; its attempt is this one's.
        order: what it asks for.
        ticket: of the pool.
        returning: it was ended here, to be queued again.
    """

    def __init__(self, job: StoredJob, order: Order, ticket: Ticket) -> None:
        """A job that was submitted."""
        self.job, self.order, self.ticket, self.returning = job, order, ticket, False
        self._lock = threading.Lock()
        self._step: Progress | None = None
        self._preview: tuple[int, NDArray[np.uint8]] | None = None
        self._reported: JobProgress | None = None

    def note(self, step: Progress) -> None:
        """A step was finished; only the last one before `news` counts, and the last preview."""
        with self._lock:
            self._step = step
            if step.preview is not None:
                self._preview = (step.index, step.preview)

    def news(self, position: int) -> JobProgress | None:
        """How far it is, None where that was said before.

        Args:
            position: in the pool's queue, of one that has not started.
        """
        with self._lock:
            step, preview, self._preview = self._step, self._preview, None
        if self.ticket.started is None:
            news = JobProgress(QUEUED, position)
        elif step is None:
            news = JobProgress(RUNNING, total=self.ticket.request.steps)
        else:
            shown, pixels = preview if preview is not None else (0, None)
            news = JobProgress(RUNNING, 0, step.index, step.total, None if pixels is None else beside(pixels), shown)
        if news == self._reported:
            return None
        self._reported = news
        return news


def beside(pixels: NDArray[np.uint8]) -> bytes:
    """Previews side by side as one PNG file: (B, h, w, 3) uint8 colours, 0 to 255."""
    count, height, width, _ = pixels.shape
    return encoded(Image.fromarray(pixels.transpose(1, 0, 2, 3).reshape(height, count * width, 3)), "png")


def result_of(seeds: list[int], flagged: list[bool], digest: str, **measured: Any) -> dict[str, Any]:
    """What a completed job says of its images, in their order, and of how they came about."""
    return {"digest": digest, "seeds": seeds, "flagged": flagged, **measured}


def verdict(error: BaseException, *, tried_again: bool) -> str:
    """What becomes of a job whose ticket ended with an error.

    Args:
        error: of the ticket.
        tried_again: whether the pool itself has run it again after its worker died.

    Returns:
        `END`: it would fail again, and fails now. `BACK`: it did nothing wrong and is queued as it was. `AGAIN`: what
        it met may pass, or may be its own doing, so it is tried a bounded number of times.
    """
    if isinstance(error, CancelledError):
        return BACK  # by the pool: who cancels a job ends it in the store first
    if isinstance(error, UnavailableError) and not tried_again:
        return AGAIN
    return END


def reason_of(error: BaseException) -> str:
    """An error for a client: without paths of this host, and without what only a programmer understands."""
    if not isinstance(error, DeployError):
        return f"a fault of the program: {type(error).__name__}"
    place = f"{error.where}: " if error.where and "/" not in error.where else ""
    fix = f" ({error.fix})" if isinstance(error, InputError) and error.fix else ""
    return f"{place}{error.what}{fix}"
