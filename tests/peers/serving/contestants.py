"""Who takes part in the comparison of servers, and how each is started: one at a time, on a port of the loopback."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.peers.prepare import MODEL
from tests.serving.server_process import Server, free_port, serve_command

OURS, APART, WHOLE, DIFFUSERS, RAY, EMBEDDED = "ours", "apart", "whole", "diffusers", "ray", "embedded"
START_SECONDS = 240.0


@dataclass(frozen=True)
class Contestant:
    """A server.

    Attributes:
        title: in tables.
        protocol: how the load asks it.
        command: from bundle, port, threads and a folder for its state.
        own: whether it runs our pipeline: such ones are compared at the same arrival rates.
        default: whether it takes part unless asked otherwise.
    """

    title: str
    protocol: str
    command: Callable[[Path, int, int, Path], list[str]]
    own: bool = True
    default: bool = True


def _serve(*options: str) -> Callable[[Path, int, int, Path], list[str]]:
    # One worker with every core, as all the others have; no cached results; nothing that waits is refused.
    return lambda bundle, port, threads, state: serve_command(bundle, port, state, "--workers", "1", *options)


def _module(name: str, *first: str, model: bool = False) -> Callable[[Path, int, int, Path], list[str]]:
    return lambda bundle, port, threads, state: [
        sys.executable, "-W", "ignore", "-m", f"tests.peers.serving.{name}", *first,
        str(MODEL if model else bundle.resolve()), str(port), str(threads)]


CONTESTANTS: Mapping[str, Contestant] = {
    OURS: Contestant("deploy serve", "openai", _serve()),
    APART: Contestant("deploy serve --batch 1", "openai", _serve("--batch", "1")),
    WHOLE: Contestant("ours, whole batches", "openai", _module("embedded", "whole")),
    DIFFUSERS: Contestant("FastAPI + diffusers", "openai", _module("tutorial_diffusers", model=True), False),
    RAY: Contestant("Ray Serve's tutorial", "imagine", _module("tutorial_ray", model=True), False),
    EMBEDDED: Contestant("Engine in FastAPI", "openai", _module("embedded", "engine"), True, False),
}


@contextmanager
def started(name: str, bundle: Path, threads: int) -> Iterator[Server]:
    """A contestant that is ready; its state folder is removed at its end.

    Raises:
        ServerError: it did not start.
    """
    port, environment = free_port(), {"OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
    if name == RAY:  # workers of Ray import this module again, wherever they start
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH", ""))))
    with tempfile.TemporaryDirectory(prefix="ldm-serving-") as state:
        command = CONTESTANTS[name].command(bundle, port, threads, Path(state))
        with Server(command, port, timeout=START_SECONDS, environment=environment) as server:
            yield server
