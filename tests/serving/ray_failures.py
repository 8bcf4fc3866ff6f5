"""What Ray Serve costs on one machine, and what happens when parts of it are killed: overhead against the server of one
process group, requests and jobs lost, the slowest answer, the time until all is there again.

    python -m tests.serving.ray_failures build/reference-onnxruntime-fp32

Three nodes (processes) on loopback, engines of 0.1 CPU: it shows overhead and failover, not scaling. Ten minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.serving.ray_cluster import ROOT, Alone, Ledger, Nodes, rebuilt, running, wait_until

ENGINES, FRONT, STATE = "ServeReplica:ldm-deploy:engines", "ServeReplica:ldm-deploy:front", "StateService"


def main() -> int:
    """Run everything and print it; 1 where something accepted was lost or an image was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder that `build` wrote")
    parser.add_argument("--requests", type=int, default=40, help="of each server, one after the other; default 40")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a request; default 10")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    alone, faults = Alone(given.bundle, given.steps), 0
    with tempfile.TemporaryDirectory() as folder:
        with single_server(given.bundle, Path(folder) / "single") as address:
            print_overhead("one process group", address, given.requests, given.steps)
        with running([f"emoji={given.bundle}"], Path(folder) / "state") as nodes:
            print_overhead("Ray Serve", nodes.server.address, given.requests, given.steps)
            newer = rebuilt(given.bundle, Path(folder) / "newer")
            print(f"\n{'under load':28}{'jobs':>6}{'lost':>6}{'images':>8}{'wrong':>7}{'refused':>9}{'slowest':>9}"
                  f"{'median':>8}{'back after':>12}")
            for name, failure, back in failures(nodes, newer):
                faults += print_failure(name, nodes, alone, given.steps, failure, back)
    return int(faults > 0)


def failures(nodes: Nodes, newer: Path) -> Iterator[tuple[str, Callable[[], object], Callable[[], bool]]]:
    """What is done to the cluster, and when it is whole again."""
    def whole(title: str, count: int) -> Callable[[], bool]:
        before = {process.pid for process in nodes.processes(title)}
        return lambda: len(now := {p.pid for p in nodes.processes(title)}) == count and now != before

    yield "nothing is killed", lambda: None, lambda: True
    yield "an engine, kill -9", lambda: nodes.kill(ENGINES), whole(ENGINES, 2)
    yield "a front, kill -9", lambda: nodes.kill(FRONT), whole(FRONT, 2)
    yield "the state service, kill -9", lambda: nodes.kill(STATE), whole(STATE, 1)
    yield "a new bundle", lambda: nodes.server.update([f"emoji={newer}"]), lambda: True
    both = whole(ENGINES, 2)
    yield "a node, kill -9", nodes.kill_node, lambda: both() and len(nodes.processes(FRONT)) == 2


def print_failure(name: str, nodes: Nodes, alone: Alone, steps: int, failure: Callable[[], object],
                  back: Callable[[], bool]) -> int:
    """One row; how many jobs were lost and images wrong."""
    ledger = Ledger(nodes.server.address, steps=steps)
    with ledger.load(jobs_each=20):
        wait_until(lambda: len(ledger.jobs) > 4 and len(ledger.images) > 4)
        began = time.monotonic()
        failure()
        wait_until(back, 180.0)
        seconds, answered = time.monotonic() - began, len(ledger.images)
        wait_until(lambda: len(ledger.images) > answered + 4)
    ends = ledger.ends()
    lost = len(ledger.jobs) - ledger.statuses(ends)["completed"]
    images = {**ledger.images, **ledger.job_images(ends)}
    wrong, latencies = len(alone.wrong(images)), [latency for latency, _ in ledger.seconds]
    print(f"{name:28}{len(ledger.jobs):6}{lost:6}{len(images):8}{wrong:7}{len(ledger.refused):9}"
          f"{max(latencies):8.1f}s{statistics.median(latencies):7.2f}s{seconds:11.1f}s")
    for what, count in Counter(ledger.refused).most_common(5):
        print(f"    {count} x {what[0]}: {what[1]:.100}")
    return lost + wrong


def print_overhead(name: str, address: str, requests: int, steps: int) -> None:
    """Requests one after the other on one connection: what is not generating is overhead."""
    with httpx.Client(base_url=address, timeout=120.0) as client:
        seconds = []
        for seed in range(requests + 5):
            began = time.monotonic()
            client.post("/v1/images/generations", json={
                "model": "emoji", "prompt": "a red apple", "seed": seed, "num_inference_steps": steps,
                "response_format": "b64_json"}).raise_for_status()
            seconds.append(time.monotonic() - began)
    measured = sorted(seconds[5:])
    print(f"{name:20} {steps} steps, one request at a time: median {1e3 * statistics.median(measured):.1f} ms, "
          f"p95 {1e3 * measured[int(0.95 * len(measured))]:.1f} ms", flush=True)


@contextmanager
def single_server(bundle: Path, state: Path) -> Iterator[str]:
    """`deploy serve` as it is without Ray."""
    command = [sys.executable, "-m", "deploy", "serve", f"emoji={bundle}", "--port", "0", "--state", str(state),
               "--workers", "1", "--deterministic"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "http://" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            yield line[line.index("http://"):].strip()
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
