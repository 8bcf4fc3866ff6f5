"""The caller's side of `bench`'s messages: starts a worker process, asks it, lets it end. See `worker_messages`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import deploy
from runtimes.errors import UnavailableError
from runtimes.system.cache_root import cache_home


class WorkerError(UnavailableError):
    """A worker died, hung, or answered with an error."""


class Worker:
    """A contestant in a process of its own, idle between requests."""

    def __init__(self, name: str, command: list[str], threads: int, timeout: float = 1200) -> None:
        """Start it and wait until it is ready.

        Raises:
            WorkerError: it did not get ready; its log's last line is the reason.
        """
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
               "TORCHINDUCTOR_CACHE_DIR": str(cache_home() / "inductor"), "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        # From the folder that holds this package, so that a checkout measures itself.
        self._process = subprocess.Popen(command, cwd=Path(deploy.__file__).parents[1], env=env, text=True, bufsize=1,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        try:
            self.ready = self._reply(timeout)
        except UnavailableError:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def ask(self, do: str, timeout: float = 1200, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            WorkerError: an error reply, or none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self.name}: {self._last_line()}") from error
        return self._reply(timeout)

    def close(self) -> None:
        """Let it end: its input closes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _reply(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise WorkerError(f"{self.name}: no answer in {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name}: {self._last_line()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _last_line(self) -> str:
        self._process.wait(20)
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with {self._process.returncode}"
