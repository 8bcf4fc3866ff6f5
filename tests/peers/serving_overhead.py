"""`python -m tests.peers.serving_overhead`: what a server adds to one request, against the bare pipeline in one run.

Pairs: the same request to a pipeline in this process and to `deploy serve`, in turns, while the other idles; each must
give the same pixels. What a server adds is its time less the pipeline's and less the writing of the image file, which
is measured apart. Jobs are sent to two servers: one whose state lies in memory, where an fsync costs nothing, and one
on the disk; the fsync of that disk is measured beside them. Ends with 1 if an aim is not met.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.table import Table

import runtimes
from runtimes.serving.engine.contract import Generated
from runtimes.serving.state.order import Order
from runtimes.serving.state.written_images import written
from tests.peers.prepare import derived
from tests.peers.results import new_report, save, show
from tests.serving.load_client import percentile
from tests.serving.server_process import Server, end_on_sigterm, free_port, serve_command

AIM_SECONDS, MET = 0.003, "met: at most 3 ms"
SETTLE_SECONDS = 0.25  # thread pools spin for a while after a run, and would take the next one's cores
LOOK_SECONDS = 0.0005  # between two looks at a job that should end now
SYNCS = 5  # of a job: its acceptance, its claim, the image's file, the folder, its completion
PROMPTS = ("a red apple", "a cat", "a house", "the moon")
MEMORY = Path("/dev/shm")


@dataclass
class Samples:
    """Seconds of the pairs, by what was measured."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **seconds: float) -> None:
        """One sample of each."""
        for name, value in seconds.items():
            self.of.setdefault(name, []).append(value)

    def added(self, name: str) -> list[float]:
        """What a way adds to the bare pipeline and the writing of the file, pair by pair."""
        return [one - bare - file for one, bare, file in zip(self.of[name], self.of["bare"], self.of["file"],
                                                             strict=True)]


class Contest:
    """A pipeline here and servers elsewhere, asked for the same images."""

    def __init__(self, bundle: Path, steps: int, threads: int) -> None:
        """Load the pipeline.

        Args:
            bundle: of the model.
            steps: of every request.
            threads: 0 is every core, as the servers take them.
        """
        self.pipeline = runtimes.load(bundle, threads=threads)
        self.bundle, self.steps = bundle, steps

    def fields(self, number: int) -> dict[str, Any]:
        """Of a request that no other is like."""
        return {"prompt": f"{PROMPTS[number % len(PROMPTS)]} {number}", "steps": self.steps, "seed": number}

    def bare(self, number: int) -> tuple[float, float, np.ndarray]:
        """Seconds of the pipeline, and of writing its image as the server does; the pixels, (H, W, 3) uint8."""
        fields = self.fields(number)
        began = time.perf_counter()
        images = self.pipeline(**fields)
        made = time.perf_counter()
        order = Order.of("model", fields)
        before = time.perf_counter()
        written(Generated(images, "0" * 64), order)
        return made - began, time.perf_counter() - before, np.asarray(images[0])

    def body(self, number: int) -> dict[str, Any]:
        """The same for a server."""
        fields = self.fields(number)
        return {"prompt": fields["prompt"], "num_inference_steps": fields["steps"], "seed": fields["seed"]}

    def synchronous(self, client: httpx.Client, number: int) -> tuple[float, np.ndarray]:
        """Seconds until the answer was here; the pixels, (H, W, 3) uint8."""
        began = time.perf_counter()
        answer = client.post("/v1/images/generations", json={**self.body(number), "response_format": "b64_json"})
        seconds = time.perf_counter() - began
        content = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
        return seconds, np.asarray(Image.open(io.BytesIO(content)))

    def job(self, client: httpx.Client, number: int, expected: float) -> tuple[float, float, np.ndarray]:
        """Seconds until a job was seen to have ended, and until it was accepted; the pixels, (H, W, 3) uint8.

        Nobody looks before `expected` seconds: looking costs the server time.
        """
        began = time.perf_counter()
        identity = client.post("/v1/jobs", json=self.body(number)).raise_for_status().json()["id"]
        accepted = time.perf_counter() - began
        time.sleep(max(expected - accepted, 0.0))
        while (job := client.get(f"/v1/jobs/{identity}").json())["status"] in ("queued", "running"):
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - began
        content = client.get(job["images"][0]["url"]).raise_for_status().content
        return seconds, accepted, np.asarray(Image.open(io.BytesIO(content)))


def main() -> int:
    """Measure, print, leave build/peers/serving_overhead.json."""
    end_on_sigterm()
    options = arguments()
    bundle = (options.bundle or derived("bundle")).resolve()
    report: dict[str, Any] = new_report(pairs=options.pairs, steps=options.steps, threads=options.threads)
    contest, samples = Contest(bundle, options.steps, options.threads), Samples()
    folders = {"disk": options.state} | ({"memory": MEMORY} if MEMORY.is_dir() else {})
    with contextlib.ExitStack() as opened:
        clients = {name: client_of(opened, bundle, folder) for name, folder in folders.items()}
        for number in range(options.pairs + 3):
            pair(contest, clients, samples if number >= 3 else Samples(), number)
    report["fsync_seconds"] = fsync_seconds(options.state)
    report["rows"] = {name: figures(samples.of[name]) for name in sorted(samples.of, key=lambda name: name != "bare")}
    report["added"] = {name: figures(samples.added(name)) for name in ("synchronous", "job, disk", "job, memory")
                       if name in samples.of}
    return 1 if shown(report) else 0


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.serving_overhead",
                                     description=(__doc__ or "").strip())
    parser.add_argument("--bundle", type=Path, help="instead of what the build of the reference model makes")
    parser.add_argument("--pairs", type=int, default=60, help="requests of each way")
    parser.add_argument("--steps", type=int, default=4, help="of each request")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the bare pipeline; 0 is every core, as "
                        "the server takes them")
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()),
                        help="folder on the disk whose fsync is paid")
    return parser.parse_args()


def client_of(opened: contextlib.ExitStack, bundle: Path, folder: Path) -> httpx.Client:
    """A server whose state lies below a folder, and a client with one open connection."""
    state, port = opened.enter_context(tempfile.TemporaryDirectory(prefix="ldm-overhead-", dir=folder)), free_port()
    server = opened.enter_context(Server(serve_command(bundle, port, Path(state), "--workers", "1"), port))
    return opened.enter_context(httpx.Client(base_url=server.url, timeout=60, trust_env=False))


def pair(contest: Contest, clients: dict[str, httpx.Client], samples: Samples, number: int) -> None:
    """The same request by every way, in an order that turns; their pixels must be equal."""
    found: dict[str, float] = {}
    pixels: dict[str, np.ndarray] = {}

    def bare() -> None:
        found["bare"], found["file"], pixels["bare"] = contest.bare(number)

    def synchronous() -> None:
        found["synchronous"], pixels["synchronous"] = contest.synchronous(clients[min(clients)], number)

    def job(name: str) -> Callable[[], None]:
        def ask() -> None:
            usual = statistics.median(samples.of["bare"]) if samples.of.get("bare") else 0.0
            found[f"job, {name}"], found[f"accepting, {name}"], pixels[f"job, {name}"] = contest.job(
                clients[name], number, 0.8 * usual)
        return ask

    ways = [bare, synchronous, *(job(name) for name in clients)]
    for way in ways[number % len(ways):] + ways[:number % len(ways)]:
        time.sleep(SETTLE_SECONDS)
        way()
    if different := [name for name, image in pixels.items() if not np.array_equal(image, pixels["bare"])]:
        raise SystemExit(f"request {number}: not the bare pipeline's pixels: {', '.join(different)}")
    began = time.perf_counter()
    clients[min(clients)].get("/health/live").raise_for_status()
    samples.add(**found, **{"an empty answer": time.perf_counter() - began})


def fsync_seconds(folder: Path, times: int = 100) -> dict[str, float]:
    """Of 4 kB that are appended to a file of a folder, each time."""
    found = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            found.append(time.perf_counter() - began)
    return figures(found)


def figures(values: list[float]) -> dict[str, float]:
    """Median with its 95 % interval by order statistics, and the quartiles."""
    ranked, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = (len(values) - 1) / 2
    return {"median": statistics.median(values), "low": ranked[max(int(middle - half), 0)],
            "high": ranked[min(int(middle + half) + 1, len(values) - 1)], "p25": percentile(values, 0.25),
            "p75": percentile(values, 0.75)}


def said_of(found: dict[str, float]) -> str:
    """Whether the median is at most what is aimed at, as far as its interval says."""
    if found["high"] <= AIM_SECONDS:
        return MET
    if found["low"] > AIM_SECONDS:
        return "NOT MET: above 3 ms"
    return "undecided: more --pairs, or an idle machine"


def shown(report: dict[str, Any]) -> list[str]:
    """Print; which aims are not met: of synchronous requests, and of jobs whose fsync costs nothing."""
    def cells(found: dict[str, float]) -> tuple[str, str, str]:
        return (f"{1000 * found['median']:.2f}", f"{1000 * found['low']:.2f} to {1000 * found['high']:.2f}",
                f"{1000 * found['p25']:.2f} to {1000 * found['p75']:.2f}")

    file = save(report, "serving_overhead")
    table = Table("", "median, ms", "95 % of the median", "quartiles", title=f"One image of {report['steps']} steps, "
                  f"{report['pairs']} pairs")
    for name, found in report["rows"].items():
        table.add_row(name, *cells(found))
    table.add_row(f"fsync on the state's disk; a job does {SYNCS}", *cells(report["fsync_seconds"]))
    show(report, table, file, 120)
    table, missed = Table("added to pipeline and file", "median, ms", "95 % of the median", "quartiles", ""), []
    for name, found in report["added"].items():
        verdict = said_of(found) if name in ("synchronous", "job, memory") else ""
        missed += [name] if verdict and verdict != MET else []
        table.add_row(name, *cells(found), verdict)
    show(report, table, file, 120)
    return missed


if __name__ == "__main__":
    sys.exit(main())
