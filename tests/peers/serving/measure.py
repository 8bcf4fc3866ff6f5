"""One server under one load: what its clients saw, and what it weighed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests.peers.prepare import ROOT
from tests.serving.load_client import OK, Plan, Record, due_within, percentile, within
from tests.serving.server_process import Server

RAMP = 0.2  # share of a load that is not counted: queues fill, shapes are planned
SPARE_SECONDS = 60.0


@dataclass
class Cell:
    """One load on one contestant; rounds are added to it.

    Attributes:
        clients: of a closed loop; 0 of an open one.
        rate: requests each second of an open loop.
        seconds: that were counted, of each round.
        ended: how many images ended in them, of each round.
        latencies: of requests, by steps.
        errors: requests that failed, by what they failed with.
        seeds: of the rounds' loads.
        load_seconds: length of each round's load.
        memory: of the server, after the load.
        cpu_share: of one core, of the process that made the load.
    """

    clients: int = 0
    rate: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    latencies: dict[int, list[float]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    load_seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    cpu_share: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Over all rounds."""
        return sum(self.ended) / sum(self.seconds)

    @property
    def by_round(self) -> list[float]:
        """Images each second of each round."""
        return [ended / seconds for ended, seconds in zip(self.ended, self.seconds, strict=True)]

    def latency(self, steps: int, share: float) -> float:
        """A percentile of the requests of so many steps, in seconds."""
        return percentile(self.latencies.get(steps, []), share)

    def mean(self, steps: int | None = None) -> float:
        """Mean latency of requests of so many steps, or of all."""
        found = [s for kind, of in self.latencies.items() if steps in (None, kind) for s in of]
        return statistics.fmean(found) if found else float("nan")

    def add(self, plan: Plan, records: Sequence[Record], cpu_share: float, memory: int) -> None:
        """A round."""
        start = RAMP * plan.seconds
        counted = (due_within if plan.rate else within)(records, start, plan.seconds)
        self.seconds.append(plan.seconds - start)
        self.ended.append(len(within(records, start, plan.seconds)))
        for record in counted:
            self.latencies.setdefault(record.steps, []).append(record.seconds)
        for record in records:
            if record.status != OK:
                key = f"{record.status} {record.reason}"[:160]
                self.errors[key] = self.errors.get(key, 0) + 1
        self.seeds.append(plan.seed)
        self.load_seconds, self.cpu_share = plan.seconds, max(self.cpu_share, cpu_share)
        self.memory.append(memory)

    def to_json(self, steps: Sequence[int]) -> dict[str, Any]:
        """Fields and figures."""
        return {**asdict(self), "images_per_second": self.images_per_second, "by_round": self.by_round,
                "figures": {kind: {"mean": self.mean(kind), "p50": self.latency(kind, 0.5),
                                   "p95": self.latency(kind, 0.95)} for kind in steps}}


def apply(plan: Plan) -> tuple[list[Record], float]:
    """Run a load in a process of its own: its records, and the share of one core that it used.

    Raises:
        RuntimeError: the process failed.
    """
    done = subprocess.run([sys.executable, "-m", "tests.serving.load_client"], input=json.dumps(asdict(plan)),
                          cwd=ROOT, capture_output=True, text=True, timeout=plan.seconds + plan.timeout + SPARE_SECONDS,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"the load's process failed: {done.stderr.strip()[-500:]}")
    answer = json.loads(done.stdout)
    return [Record(**record) for record in answer["records"]], answer["cpu_share"]


def loaded(server: Server, cell: Cell, plan: Plan) -> None:
    """Add one round to a cell."""
    records, share = apply(replace(plan, url=server.url))
    cell.add(plan, records, share, server.memory_bytes())
