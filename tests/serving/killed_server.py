"""A real server in a process of its own, which is killed and started again in the same folder."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

GONE_SECONDS = 20.0


class Killed:
    """One server after the other, of one port and state folder.

    Attributes:
        port: of the loopback.
        point: at which the present one kills itself; "" for none.
        ready_seconds: from its start until it took requests.
    """

    def __init__(self, bundle: Path, folder: Path) -> None:
        """Nothing is started yet."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._bundle, self._folder = bundle, folder
        self.point, self.ready_seconds = "", 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self, point: str, count: int) -> None:
        """Start one that kills itself the `count`-th time, from 0, that its store comes to a point."""
        command = [sys.executable, "-m", "tests.serving.killable_server", point, str(count),
                   f"emoji={self._bundle}", "--port", str(self.port), "--state", str(self._folder / "state"),
                   "--workers", "1", "--public-images", "--queue", "10000", "--log-format", "json"]
        self.point, self._began = point, time.monotonic()
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                                             env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether it takes requests within so long."""
        until = time.monotonic() + seconds
        while self.alive and time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                connection.request("GET", "/health/ready")
                status = connection.getresponse().status
                connection.close()
                if status == 200:
                    self.ready_seconds = time.monotonic() - self._began
                    return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """End it with -9, and wait until its workers have noticed.

        Raises:
            AssertionError: a worker outlives its server.
        """
        if self._process is None:
            return
        if self.alive:
            self._process.kill()
        self._process.wait(GONE_SECONDS)
        until = time.monotonic() + GONE_SECONDS
        while self._group_lives():
            assert time.monotonic() < until, "a worker outlives its server"
            time.sleep(0.01)

    def end(self) -> int:
        """End it with SIGTERM; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def _group_lives(self) -> bool:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True
