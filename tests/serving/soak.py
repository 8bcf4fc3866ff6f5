"""`python -m tests.serving.soak --minutes 20`: mixed load on `deploy serve`: nothing lost, nothing wrong.

Clients generate, stream, edit, send jobs and fetch images; others hang up, cancel, or send what must be refused. The
result cache is off. Afterwards every image is compared with a lone run of its request: the same pixels, made by a
pipeline without company in another process. Memory must be flat over the last three quarters. Ends with 1 if broken.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from tests.serving.ledger import ENDS, Ledger, growth
from tests.serving.load_client import OK
from tests.serving.server_process import ROOT, Server, end_on_sigterm, free_port, serve_command
from tests.serving.soak_client import GENERATIONS, JOBS, Client
from tests.serving.soak_requests import wanted

JUDGED = 0.75  # the share of the run at its end in which memory is judged
SAMPLE_SECONDS = 2.0
LAST_REQUESTS = 3  # under way when the server is asked to end
# A queue that is full now and then, and a result cache that never answers.
SERVER_OPTIONS = ("--queue", "8", "--cache-bytes", "0", "--log-format", "json")
console = Console(width=None if sys.stdout.isatty() else 150, markup=False, emoji=False)


@dataclass
class Soak:
    """One run.

    Attributes:
        memory: seconds since the load began, and the proportional set size of all the server's processes.
        ended_with: exit code of the server, which is asked to end while it works.
    """

    options: argparse.Namespace
    ledger: Ledger
    memory: list[tuple[float, float]] = field(default_factory=list)
    ended_with: int | None = None
    wrong: list[int] = field(default_factory=list)

    @property
    def judged_memory(self) -> list[tuple[float, float]]:
        """Of the last three quarters."""
        start = self.options.minutes * 60 * (1 - JUDGED)
        return [sample for sample in self.memory if sample[0] >= start]

    def broken(self) -> list[str]:
        """What was not as it must be."""
        found = list(self.ledger.faults)
        found += [f"lost: job {identity}" for identity in self.ledger.lost]
        found += [f"wrong: request {number}: {wanted(number)}" for number in self.wrong]
        if self.ended_with != 0:
            found.append(f"the server ended with {self.ended_with}")
        if not self.ledger.images:
            found.append("no image was made")
        grew = growth(self.judged_memory) if len(self.judged_memory) > 2 else 0.0
        if len(self.judged_memory) <= 2 or grew > self.options.growth:
            found.append(f"memory grew by {100 * grew:.1f} % in {len(self.judged_memory)} samples, of at most "
                         f"{100 * self.options.growth:.1f} %")
        return found


def main(arguments: list[str] | None = None) -> int:
    """Run, compare, print; leave build/serving/soak.json beside the ledger."""
    options = parsed(arguments)
    folder = ROOT / "build" / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "soak.jsonl")
    ledger.file.unlink(missing_ok=True)
    soak = Soak(options, ledger)
    with tempfile.TemporaryDirectory(prefix="ldm-soak-") as state:
        port = free_port()
        server = Server(serve_command(options.bundle, port, Path(state), *SERVER_OPTIONS), port)
        try:
            asyncio.run(load(soak, server))
        finally:
            soak.ended_with = server.stop() if soak.ended_with is None else soak.ended_with
    console.print(f"lone runs of {len(ledger.images)} requests, in another process")
    soak.wrong = ledger.wrong(lone_runs(options.bundle, sorted(ledger.images)))
    broken = soak.broken()
    show(soak, broken)
    if broken:
        console.print(f"the server's last lines: {server.last_lines(3)}")
    (folder / "soak.json").write_text(json.dumps(as_json(soak, broken), indent=2) + "\n")
    return 1 if broken else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak", description=(__doc__ or "").strip())
    parser.add_argument("--minutes", type=float, default=20.0, help="of load")
    parser.add_argument("--clients", type=int, default=10, help="at the same time")
    parser.add_argument("--distinct", type=int, default=2000, help="requests that differ; later ones come again, each "
                        "made anew and compared with the same lone run; 0: none comes twice")
    parser.add_argument("--growth", type=float, default=0.02, help="of memory over the last three quarters, at most")
    parser.add_argument("--bundle", type=Path, help="instead of what the build of the reference model makes")
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    options = parser.parse_args(arguments)
    if options.bundle is None:
        from tests.peers.prepare import derived

        options.bundle = derived("bundle")
    options.bundle = options.bundle.resolve()
    return options


async def load(soak: Soak, server: Server) -> None:
    """All clients until the time is over, then what is still under way, then the end of the server while it works."""
    options, ledger, began = soak.options, soak.ledger, time.monotonic()
    counter = itertools.count()

    def number() -> int:
        following = next(counter)
        return following % options.distinct if options.distinct else following

    async with httpx.AsyncClient(base_url=server.url, timeout=180, trust_env=False, limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=64)) as http:
        clients = [Client(http, ledger, number, options.seed * 1000 + i) for i in range(options.clients)]
        sampler = asyncio.create_task(sample(soak, server, began))
        await asyncio.gather(*(client.run(lambda: time.monotonic() - began > 60 * options.minutes)
                               for client in clients))
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)
        await settle(ledger, http)
        await nothing_left(ledger, http)
        soak.ended_with = await ended_while_working(ledger, http, server, number)


async def sample(soak: Soak, server: Server, began: float) -> None:
    """Weigh the server now and then, and say so."""
    for count in itertools.count():
        memory = await asyncio.to_thread(server.memory_bytes)
        soak.memory.append((time.monotonic() - began, float(memory)))
        if count % 15 == 0:
            console.print(f"{soak.memory[-1][0]:6.0f} s  {memory / 1e6:6.0f} MB  {len(soak.ledger.images)} requests "
                          f"with images, {len(soak.ledger.accepted)} jobs, {len(soak.ledger.faults)} faults")
        await asyncio.sleep(SAMPLE_SECONDS)


async def settle(ledger: Ledger, http: httpx.AsyncClient) -> None:
    """Ask for every accepted job again: it must have ended, as it was seen to."""
    for identity in list(ledger.accepted):
        before = ledger.ended.get(identity)
        for _ in range(300):
            answer = await http.get(f"{JOBS}/{identity}")
            if answer.status_code == httpx.codes.NOT_FOUND and before is not None:
                break  # forgotten: a DELETE that came after its end
            status = answer.json().get("status", "")
            if status in ENDS:
                ledger.job_ended(identity, status)
                break
            await asyncio.sleep(0.2)


async def nothing_left(ledger: Ledger, http: httpx.AsyncClient) -> None:
    """Soon after the last client is gone, nothing waits or runs: what was abandoned was cancelled."""
    for _ in range(100):
        text = (await http.get("/metrics")).text
        figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        left = {name: float(figures[name]) for name in ("ldm_queue_depth", "ldm_running")}
        if not any(left.values()):
            return
        await asyncio.sleep(0.1)
    ledger.fault(f"nobody asks, and still: {left}")


async def ended_while_working(ledger: Ledger, http: httpx.AsyncClient, server: Server, number: Any) -> int:
    """SIGTERM with requests under way: all of them are answered, and the exit code is 0."""
    async def ask() -> None:
        request = wanted(number())
        while request.edit:
            request = wanted(number())
        answer = await http.post(GENERATIONS, json={**request.body(), "response_format": "b64_json"})
        if answer.status_code != OK:
            ledger.fault(f"a request that was under way at the server's end got {answer.status_code}")
        ledger.end("at the end", str(answer.status_code), request.number)

    tasks = [asyncio.create_task(ask()) for _ in range(LAST_REQUESTS)]
    await asyncio.sleep(0.1)
    code = await asyncio.to_thread(server.stop)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            ledger.fault(f"a request that was under way at the server's end: {type(result).__name__} {result}")
    return code


def lone_runs(bundle: Path, numbers: list[int]) -> dict[int, list[str]]:
    """Digests of the images that each request gives alone, from a process that runs one after another."""
    done = subprocess.run([sys.executable, "-m", "tests.serving.soak_requests", str(bundle)], input=json.dumps(numbers),
                          cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"lone runs failed: {done.stderr[-500:]}")
    return {int(number): found for number, found in json.loads(done.stdout).items()}


def as_json(soak: Soak, broken: list[str]) -> dict[str, Any]:
    """What is written."""
    return {"minutes": soak.options.minutes, "clients": soak.options.clients, "broken": broken, "memory": soak.memory,
            "ends": {" ".join(key): count for key, count in soak.ledger.ends.items()},
            "statuses": dict(soak.ledger.statuses), "requests": len(soak.ledger.images),
            "images_compared": sum(len(one) for every in soak.ledger.images.values() for one in every),
            "wrong": soak.wrong, "lost": soak.ledger.lost, "jobs": len(soak.ledger.accepted)}


def show(soak: Soak, broken: list[str]) -> None:
    """What was done, how it ended, and what is broken."""
    table = Table("what", "ended", "times", title=f"{soak.options.minutes:g} minutes, {soak.options.clients} clients")
    for (action, how), count in sorted(soak.ledger.ends.items()):
        table.add_row(action, how, str(count))
    console.print(table)
    found = as_json(soak, [])
    console.print(f"answers by status: {found['statuses']}")
    console.print(f"{len(soak.ledger.accepted)} jobs accepted, {len(soak.ledger.lost)} lost; "
                  f"{found['images_compared']} images compared with lone runs of {found['requests']} requests, "
                  f"{len(soak.wrong)} wrong; server ended with {soak.ended_with}")
    if len(soak.judged_memory) > 2:
        values = [value / 1e6 for _, value in soak.judged_memory]
        console.print(f"memory over the last {JUDGED:.0%}: {values[0]:.0f} to {values[-1]:.0f} MB, least "
                      f"{min(values):.0f}, most {max(values):.0f}, along its line "
                      f"{100 * growth(soak.judged_memory):+.2f} %")
    for what in broken[:40]:
        console.print(f"BROKEN: {what}")
    console.print(f"{len(broken)} broken" if broken else "nothing lost, nothing wrong")


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
