"""Who takes part, and the caller's side of the conversation with a worker process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.peers import prepare
from tests.peers.prepare import PEERS, ROOT, PreparationError

EAGER, COMPILED, OURS, OPTIMUM = "diffusers eager", "torch.compile(unet)", "ours", "optimum-onnx"
BARE_ORT = "bare ORT"


def _ours(threads: int, bundle: Path | None = None) -> list[str]:
    folder = bundle.resolve() if bundle else prepare.derived("bundle")
    return [sys.executable, "-m", "tests.peers.worker_ours", str(folder), str(threads)]


def _torch(kind: str) -> Callable[[int], list[str]]:
    def command(threads: int) -> list[str]:
        module = ["-m", "tests.peers.worker_torch"]
        return [sys.executable, "-W", "ignore", *module, str(prepare.MODEL), str(threads), kind]

    return command


def _optimum(threads: int) -> list[str]:
    python = prepare.optimum_python()
    exported = PEERS / f"optimum-export-{prepare.model_digest()}"
    return [str(python), "-W", "ignore", "-m", "tests.peers.worker_optimum", str(prepare.derived("old-layout")),
            str(threads), str(exported)]


def _bare_ort(threads: int) -> list[str]:
    return [sys.executable, "-m", "tests.peers.worker_bare_ort", str(prepare.derived("unet")), str(threads)]


# name -> (what --only calls it, threads -> command). The order is that of a round.
CONTESTANTS: Mapping[str, tuple[str, Callable[[int], list[str]]]] = {
    OURS: ("ours", _ours),
    EAGER: ("eager", _torch("eager")),
    COMPILED: ("compile", _torch("compile")),
    OPTIMUM: ("optimum", _optimum),
}


class WorkerError(PreparationError):
    """A worker died, hung, or said no."""


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
               "TORCHINDUCTOR_CACHE_DIR": str(PEERS / "inductor"), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, bufsize=1, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._log)
        began = time.perf_counter()
        self.ready = self._reply(timeout)
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
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
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


def start(name: str, threads: int, bundle: Path | None = None) -> Worker:
    """Prepare and start a contestant by name, or the bare-ORT yardstick.

    Raises:
        PreparationError: it cannot run here.
    """
    if name == OURS:
        return Worker(name, _ours(threads, bundle), threads)
    make = _bare_ort if name == BARE_ORT else CONTESTANTS[name][1]
    return Worker(name, make(threads), threads)
