"""Forgets ended jobs in the background, by age and by the bytes of their images, and at once where the disk is full."""

from __future__ import annotations

import logging
import threading

from runtimes.serving.state.store import Store

logger = logging.getLogger(__name__)
EVERY_SECONDS = 60.0


class Retention:
    """A thread that calls `Store.retain`. It starts with it; `stop` ends it."""

    def __init__(self, store: Store, *, hours: float, image_bytes: int, every_seconds: float = EVERY_SECONDS) -> None:
        """Begin, with a look now.

        Args:
            store: whose jobs are forgotten.
            hours: that an ended job stays.
            image_bytes: that the files of ended jobs may take.
            every_seconds: how often it looks.
        """
        self._store, self._seconds, self._bytes, self._every = store, hours * 3600, image_bytes, every_seconds
        self._wanted, self._stopping = threading.Event(), False
        self._wanted.set()
        self._thread = threading.Thread(target=self._work, name="retention", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Look now, without waiting for it."""
        self._wanted.set()

    def stop(self) -> None:
        """End; a look that is under way is finished."""
        self._stopping = True
        self._wanted.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._wanted.wait(self._every)
            self._wanted.clear()
            if self._stopping:
                return
            try:
                count = self._store.retain(seconds=self._seconds, image_bytes=self._bytes)
            except Exception:
                logger.exception("ended jobs are not forgotten for now")
            else:
                if count:
                    logger.info("%d ended jobs were forgotten", count)
