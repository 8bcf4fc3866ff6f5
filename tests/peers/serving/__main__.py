"""`python -m tests.peers.serving`: servers of one model, one at a time under the same loads, in one run.

Closed loops of 1 to 16 clients, then open loops with Poisson arrivals; requests of 4, 10 and 25 steps, equally often,
no two alike. Each round starts the contestants in turn, in the other order the next time. Every image of the first
request must be diffusers' own: a contestant whose image differs is wrong, and is not measured. Ends with 1 if an aim
that could be measured is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from runtimes.errors import UnavailableError
from tests.peers.prepare import ROOT, derived
from tests.peers.results import new_report, save
from tests.peers.serving import tables
from tests.peers.serving.contestants import APART, CONTESTANTS, DIFFUSERS, OURS, RAY, started
from tests.peers.serving.measure import Cell, loaded
from tests.peers.serving.queueing import Rates
from tests.serving.load_client import OK, STEPS, Ask, Plan, sender
from tests.serving.server_process import Server, end_on_sigterm

SAME_IMAGE_DB = 40.0
FIRST = Ask("a red apple", 10, 7)
OPEN_LONGER = 2.0  # than a closed loop's window
log = Console(stderr=True, markup=False, emoji=False)


@dataclass
class Run:
    """What is measured, and what was.

    Attributes:
        closed, open: cells by contestant, then by clients or rate.
        first: each contestant's image of the first request, (H, W, 3) uint8.
    """

    options: argparse.Namespace
    bundle: Path
    report: dict[str, Any]
    closed: dict[str, dict[int, Cell]] = field(default_factory=dict)
    open: dict[str, dict[float, Cell]] = field(default_factory=dict)
    first: dict[str, np.ndarray] = field(default_factory=dict)
    rates: Rates | None = None

    @property
    def names(self) -> list[str]:
        """Of contestants that are not out."""
        return [name for name in self.options.only if name not in self.report["unavailable"]]

    def out(self, name: str, why: str) -> None:
        """A contestant takes no further part."""
        self.report["unavailable"][name] = why
        log.print(f"{name}: {why}", style="red")


def main() -> int:
    """Measure, print, leave build/peers/serving.json."""
    end_on_sigterm()
    options = arguments()
    report = new_report(seconds=options.seconds, rounds=options.rounds, threads=options.threads, steps=STEPS)
    run = Run(options, options.bundle or derived("bundle"), report)
    for number in range(options.rounds):
        for name in run.names if number % 2 == 0 else run.names[::-1]:
            turn(run, name, number, closed_loops)
    compare_first_images(run)
    for number in range(options.rounds if options.shares else 0):
        for name in run.names if number % 2 == 0 else run.names[::-1]:
            turn(run, name, number, open_loops)
    if OURS in run.names and options.shares:
        run.rates = engine_rates(run)
    report["rows"] = {
        "closed": {name: {n: cell.to_json(STEPS) for n, cell in cells.items()} for name, cells in run.closed.items()},
        "open": {name: {r: cell.to_json(STEPS) for r, cell in cells.items()} for name, cells in run.open.items()}}
    aims = tables.aims(run.closed, run.open)
    report["aims"] = [aim.to_json() for aim in aims]
    report["queueing"] = tables.compared(run.rates, run.closed.get(OURS, {}), run.open.get(OURS, {}))
    tables.show_all(report, run.closed, run.open, aims, save(report, "serving"))
    return 1 if any(aim.met is False for aim in aims) else 0


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.serving", description=(__doc__ or "").strip())
    parser.add_argument("--bundle", type=Path, help="ours, instead of what the build of the reference model makes")
    parser.add_argument("--seconds", type=float, default=7.0, help="of one closed loop; an open one takes twice it")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contestant is started")
    parser.add_argument("--clients", type=listed(int), default=[1, 2, 4, 8, 16],
                        help="of the closed loops, with commas")
    parser.add_argument("--shares", type=listed(float), default=[0.5, 0.8],
                        help="of capacity, with commas: arrivals of the open loops; '' leaves them out")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each")
    parser.add_argument("--only", type=listed(str), default=[n for n, c in CONTESTANTS.items() if c.default],
                        help=f"contestants, with commas, of {', '.join(CONTESTANTS)}")
    options = parser.parse_args()
    if unknown := set(options.only) - set(CONTESTANTS):
        parser.error(f"unknown contestant {', '.join(sorted(unknown))}")
    if min(options.seconds, options.rounds, options.threads, *options.clients) <= 0:
        parser.error("--seconds, --rounds, --threads and --clients are above 0")
    return options


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads a list with commas."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def turn(run: Run, name: str, number: int, loops: Any) -> None:
    """Start a contestant, let it make one image, and apply loads to it."""
    log.print(f"{name}, round {number + 1}", style="dim")
    try:
        with started(name, run.bundle, run.options.threads) as server:
            plan = Plan(server.url, CONTESTANTS[name].protocol, run.options.seconds, timeout=120.0)
            run.first.setdefault(name, first_image(plan))
            loops(run, name, number, server, plan)
    except (UnavailableError, RuntimeError, subprocess.TimeoutExpired) as error:
        run.out(name, str(error))


def first_image(plan: Plan) -> np.ndarray:
    """(H, W, 3) uint8 of the first request.

    Raises:
        RuntimeError: it was refused.
    """
    async def ask() -> tuple[int, bytes]:
        async with sender(plan) as send:
            return await send(FIRST)

    status, content = asyncio.run(ask())
    if status != OK:
        raise RuntimeError(f"the first request got {status}: {content[:300]!r}")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def compare_first_images(run: Run) -> None:
    """Whose image is not diffusers' is out: what it does in less time is something else."""
    by = next((name for name in (DIFFUSERS, RAY) if name in run.first), None)
    run.report["psnr_db"] = {}
    for name in [n for n in run.names if n in run.first and by not in (None, n)]:
        psnr = decibels(run.first[str(by)], run.first[name])
        run.report["psnr_db"][name] = psnr
        if psnr < SAME_IMAGE_DB:
            run.closed.pop(name, None)
            run.out(name, f"its image is {psnr:.1f} dB from diffusers', below {SAME_IMAGE_DB:.0f} dB")


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Between (H, W, 3) uint8 images; 99 for equal ones, below zero for different shapes."""
    if one.shape != other.shape:
        return -1.0
    square = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 99.0 if square == 0 else float(10 * np.log10(255**2 / square))


def closed_loops(run: Run, name: str, number: int, server: Server, plan: Plan) -> None:
    """One for each number of clients; all contestants are asked the same in the same round."""
    loaded(server, Cell(), Plan(**{**vars(plan), "clients": max(run.options.clients), "seconds": 1.0, "seed": 999}))
    for clients in run.options.clients:
        cell = run.closed.setdefault(name, {}).setdefault(clients, Cell(clients))
        loaded(server, cell, Plan(**{**vars(plan), "clients": clients, "seed": 100 * number + clients}))
        log.print(f"  {clients} clients: {cell.by_round[-1]:.1f} images/s", style="dim")


def open_loops(run: Run, name: str, number: int, server: Server, plan: Plan) -> None:
    """One for each arrival rate."""
    loaded(server, Cell(), Plan(**{**vars(plan), "clients": 8, "seconds": 1.0, "seed": 999}))
    for place, rate in enumerate(arrival_rates(run, name)):
        cell = run.open.setdefault(name, {}).setdefault(rate, Cell(rate=rate))
        longer = plan.seconds * OPEN_LONGER
        loaded(server, cell, Plan(**{**vars(plan), "rate": rate, "seconds": longer, "seed": 100 * number + place + 50}))
        log.print(f"  {rate} arrivals/s: p95 of {min(STEPS)} steps {cell.latency(min(STEPS), 0.95):.3f} s", style="dim")


def capacity(run: Run, name: str) -> float:
    """Images each second that it made at the most in a closed loop."""
    return max((cell.images_per_second for cell in run.closed.get(name, {}).values()), default=0.0)


def arrival_rates(run: Run, name: str) -> list[float]:
    """Shares of a capacity: our variants all meet the rates that one after another can just do, ours its own too."""
    base = APART if CONTESTANTS[name].own and APART in run.closed else name
    shares = run.options.shares if CONTESTANTS[name].own else run.options.shares[-1:]
    rates = [round(share * capacity(run, base), 2) for share in shares]
    if name == OURS and base != OURS:
        rates.append(round(max(run.options.shares) * capacity(run, OURS), 2))
    return [rate for rate in dict.fromkeys(rates) if rate > 0]


def engine_rates(run: Run) -> Rates:
    """Seconds of our engine by images side by side, measured in a process of its own while no server runs."""
    log.print("rates of the engine", style="dim")
    done = subprocess.run([sys.executable, "-m", "tests.peers.serving.queueing", str(run.bundle), "--json", "--threads",
                           str(run.options.threads)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    values = json.loads(done.stdout)
    run.report["engine_seconds"] = values
    return Rates(**{part: tuple(value) if isinstance(value, list) else value for part, value in values.items()})


if __name__ == "__main__":
    sys.exit(main())
