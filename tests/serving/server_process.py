"""A server in a process of its own: started, asked whether it is ready, weighed, ended. For measurements and soaks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from runtimes.errors import UnavailableError

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 30.0


class ServerError(UnavailableError):
    """A server did not start, or ended by itself; the text holds the last lines of its output."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


def serve_command(bundle: Path, port: int, state: Path, *options: str) -> list[str]:
    """`deploy serve` of one bundle on a port of the loopback."""
    return [sys.executable, "-m", "deploy", "serve", str(bundle), "--port", str(port), "--state", str(state), *options]


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that the servers that it started are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """A process, with all that it starts, from its first answer until its end. A context manager."""

    def __init__(self, command: Sequence[str], port: int, *, ready: str = "/health/ready", timeout: float = 120.0,
                 environment: Mapping[str, str] | None = None) -> None:
        """Start it, and wait until the path `ready` answers with 200.

        Raises:
            ServerError: it ended, or was not ready in time.
        """
        self.url, began = f"http://127.0.0.1:{port}", time.monotonic()
        self._output = ""
        self._log = tempfile.TemporaryFile("w+b")
        self._process = subprocess.Popen(
            list(command), cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_until_ready(ready, began + timeout)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def _wait_until_ready(self, path: str, until: float) -> None:
        while True:
            if self._process.poll() is not None:
                raise ServerError(f"it ended with {self._process.returncode}: {self.last_lines()}", where="server")
            with suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5, trust_env=False).status_code == httpx.codes.OK:
                    return
            if time.monotonic() > until:
                raise ServerError(f"not ready in time: {self.last_lines()}", where="server")
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """It and everything that it started, itself first."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes: pages that they share are counted once."""
        total = 0
        for process in self.processes():
            with suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss
        return total

    def last_lines(self, count: int = 12) -> str:
        """Of its output, on one line."""
        if not self._log.closed:
            self._log.seek(0)
            self._output = self._log.read().decode(errors="replace")
        lines = self._output.strip().splitlines()
        return " | ".join(line.strip() for line in lines[-count:]) or "no output"

    def wait(self, seconds: float) -> int:
        """Its exit code, once it ended by itself or by a signal."""
        return self._process.wait(seconds)

    def stop(self) -> int:
        """Ask it to end, kill what is left of it after a while, and give its exit code."""
        all_of_it = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        _, alive = psutil.wait_procs(all_of_it[1:], timeout=5)
        for process in [*alive, *all_of_it[:1]]:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares creation times: never a process that took the number over
        code = self._process.wait()
        self.last_lines()  # what it wrote can be read after its end
        self._log.close()
        return code
