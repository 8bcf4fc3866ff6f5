"""Who takes part in the comparison with other projects, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.bench.worker_client import Worker
from tests.peers import prepare
from tests.peers.prepare import PEERS

EAGER, COMPILED, OURS, OPTIMUM = "diffusers eager", "torch.compile(unet)", "ours", "optimum-onnx"
BARE_ORT = "bare ORT"


def _ours(threads: int, bundle: Path | None = None) -> list[str]:
    folder = bundle.resolve() if bundle else prepare.derived("bundle")
    return [sys.executable, "-m", "deploy.bench.child_bundle", str(folder), str(threads), "cpu"]


def _torch(kind: str) -> Callable[[int], list[str]]:
    def command(threads: int) -> list[str]:
        module = ["-m", "deploy.bench.child_torch"]
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


def start(name: str, threads: int, bundle: Path | None = None) -> Worker:
    """Prepare and start a contestant by name, or the bare-ORT yardstick.

    Raises:
        PreparationError: it cannot run here.
    """
    if name == OURS:
        return Worker(name, _ours(threads, bundle), threads)
    make = _bare_ort if name == BARE_ORT else CONTESTANTS[name][1]
    return Worker(name, make(threads), threads)
