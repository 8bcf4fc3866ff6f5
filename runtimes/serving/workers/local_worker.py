"""`LocalWorker`: starts the process of a worker on this machine, again after it died, and ends it."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic

from runtimes.serving.workers.channel import Channel, Message
from runtimes.serving.workers.connected_engine import Offer, WorkerOptions
from runtimes.serving.workers.link import Link

MODULE = "runtimes.serving.workers.engine_process"
SETTLED_SECONDS = 60.0  # a worker that lived so long is started again at once


class LocalWorker:
    """One process at a time.

    Attributes:
        link: to the process that runs now, or None between two.
        restarts: how often it was started again.
        due: when it may be started, of `time.monotonic`.
    """

    def __init__(self, options: WorkerOptions, backoff_seconds: float, most_backoff_seconds: float) -> None:
        """Start nothing yet."""
        self.options = options
        self.link: Link | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts, self.due = 0, monotonic()
        self._least, self._most, self._backoff, self._began = backoff_seconds, most_backoff_seconds, 0.0, 0.0

    @property
    def first(self) -> bool:
        """Whether the process that runs is the first."""
        return self.restarts == 0

    def start(self, bundles: Mapping[str, Offer]) -> Channel:
        """Start the process and say what it needs to know."""
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, "--fd", str(theirs.fileno())], stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths})
        self._began = monotonic()
        channel = Channel(ours)
        channel.send(Message("start", {"options": dataclasses.asdict(self.options), "bundles": described(bundles)}))
        return channel

    def lost(self) -> None:
        """The process is gone or must go: wait longer before each start that follows soon."""
        self.link = None
        self.kill()
        settled = monotonic() - self._began > SETTLED_SECONDS
        self._backoff = 0.0 if settled else min(max(2 * self._backoff, self._least), self._most)
        self.due = monotonic() + self._backoff
        self.restarts += 1

    def kill(self) -> None:
        """End the process at once."""
        if self.process is not None:
            with suppress(OSError):
                self.process.kill()
            self.process.wait()

    def wait(self, seconds: float) -> None:
        """Let the process end by itself, and kill it if it does not."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            self.kill()


def described(bundles: Mapping[str, Offer]) -> dict[str, list[object]]:
    """Bundles for a message."""
    return {name: offer.to_json() for name, offer in bundles.items()}
