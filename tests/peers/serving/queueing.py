"""What an engine will do under a load, from seconds that were measured without any: capacity, latency, waiting.

    python -m tests.peers.serving.queueing BUNDLE --rates 2,5,8 --steps 4,10,25        # measures, then predicts

Requests arrive by Poisson. At most `most` advance beside each other, one step a round; the others wait in order. Of a
server like this one that shares itself equally (processor sharing), the mean follows from the rate at each number of
requests alone, whatever the distribution of steps (`predict`). Percentiles come from running the rounds (`simulate`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.peers.results import new_report, save, show
from tests.serving.load_client import STEPS, arrivals, asks, percentile

MOST = 8  # images that an engine denoises side by side
ROUNDS = 10  # steps of the requests whose seconds are measured
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Seconds of an engine by the number of images that share a call: index 0 is of one image.

    Attributes:
        prepare: reading prompts, making noise.
        round: one step of all.
        finish: decoding.
        other: of one request, what a server adds: HTTP, hops between processes, encoding. Latency alone.
    """

    prepare: tuple[float, ...]
    round: tuple[float, ...]
    finish: tuple[float, ...]
    other: float = 0.0

    @property
    def most(self) -> int:
        """Images side by side."""
        return len(self.round)

    def per_second(self, steps: Sequence[int], images: int) -> float:
        """Requests that end each second while so many are denoised, their steps those of the mix."""
        # Prompts and images are taken as coming one by one; some happen to meet, and cost less together.
        return 1 / (statistics.fmean(steps) * self.round[images - 1] / images + self.prepare[0] + self.finish[0])


@dataclass(frozen=True)
class Prediction:
    """Latency in seconds of one kind of request, and of all."""

    rate: float
    utilisation: float
    mean: float
    mean_of: dict[int, float]


def predict(rates: Rates, steps: Sequence[int], arrival_rate: float) -> Prediction:
    """The mean latency of a processor-sharing server whose speed depends on how many it serves; infinite if it drowns.

    The number of requests N has P(N = n) proportional to the product of arrival_rate / rate(i) for i in 1..n, where
    rate(i) is that of min(i, most): exact for processor sharing, for any distribution of steps; here the requests
    beyond `most` wait instead. Little's law gives the mean latency, and that of each number of steps by its share.
    """
    speed = [rates.per_second(steps, n) for n in range(1, rates.most + 1)]
    load = arrival_rate / speed[-1]
    if load >= 1:
        return Prediction(arrival_rate, load, math.inf, dict.fromkeys(steps, math.inf))
    weights = [1.0]
    for rate in speed:
        weights.append(weights[-1] * arrival_rate / rate)
    full = weights.pop() / (1 - load)  # of all states with `most` requests or more: a geometric series
    total = sum(weights) + full
    busy = (sum(n * weight for n, weight in enumerate(weights)) + rates.most * full) / total
    waiting = full * load / (1 - load) / total
    each, waits = busy / arrival_rate, waiting / arrival_rate
    own = {s: s * rates.round[0] + rates.prepare[0] + rates.finish[0] for s in steps}
    share = {s: seconds / statistics.fmean(own[s] for s in steps) for s, seconds in own.items()}
    return Prediction(arrival_rate, load, each + waits + rates.other,
                      {s: each * share[s] + waits + rates.other for s in own})


def simulate(rates: Rates, requests: Sequence[tuple[float, int]]) -> list[float]:
    """The latency of each request, by the engine's own rule, in its seconds.

    Args:
        rates: as measured.
        requests: when each arrives, ascending, and its steps.
    """
    latency, waiting = [0.0] * len(requests), deque(range(len(requests)))
    running: dict[int, int] = {}
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, requests[waiting[0]][0])
        admitted = 0
        while waiting and len(running) < rates.most and requests[waiting[0]][0] <= now:
            number = waiting.popleft()
            running[number] = requests[number][1]
            admitted += 1
        now += rates.prepare[admitted - 1] if admitted else 0.0
        now += rates.round[len(running) - 1]
        running = {number: left - 1 for number, left in running.items()}
        done = [number for number, left in running.items() if left == 0]
        now += rates.finish[len(done) - 1] if done else 0.0
        for number in done:
            latency[number] = now - requests[number][0] + rates.other
            del running[number]
    return latency


def simulated(rates: Rates, steps: Sequence[int], arrival_rate: float, count: int = 20_000, seed: int = 0,
              ) -> dict[int, list[float]]:
    """Latencies by steps of many requests of a mix."""
    chance, at, requests = random.Random(seed), 0.0, list[tuple[float, int]]()
    for _ in range(count):
        at += chance.expovariate(arrival_rate)
        requests.append((at, chance.choice(list(steps))))
    found: dict[int, list[float]] = {s: [] for s in steps}
    for (_, kind), seconds in zip(requests, simulate(rates, requests), strict=True):
        found[kind].append(seconds)
    return found


def replayed(rates: Rates, steps: Sequence[int], arrival_rate: float, seconds: float, seeds: Sequence[int],
             ramp: float = 0.0) -> dict[int, list[float]]:
    """Latencies by steps of the very requests that open loops of these seeds sent, at their due times.

    Args:
        ramp: share of the seconds at their start whose requests are not counted, though they are served.
    """
    found: dict[int, list[float]] = {s: [] for s in steps}
    for seed in seeds:
        due = arrivals(arrival_rate, seconds, seed)
        requests = [(at, ask.steps) for at, ask in zip(due, itertools.islice(asks(steps, seed), len(due)), strict=True)]
        for (at, kind), latency in zip(requests, simulate(rates, requests), strict=True):
            found[kind] += [latency] if at >= ramp * seconds else []
    return found


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(bundle: Path, threads: int, most: int = MOST) -> Rates:
    """The seconds of a bundle on this machine; medians, the numbers of images in turns."""
    import runtimes
    from runtimes.inputs.request import Request

    pipeline = runtimes.load(bundle, threads=threads)
    spent: dict[str, list[list[float]]] = {part: [[] for _ in range(most)] for part in ("prepare", "round", "finish")}
    for repeat in range(REPEATS + 1):
        for images in range(1, most + 1):
            clock = [time.perf_counter()]
            jobs = pipeline.prepare([Request(f"a cat {repeat} {images} {i}", steps=ROUNDS, seed=i)
                                     for i in range(images)])
            clock.append(time.perf_counter())
            for _ in range(ROUNDS):
                pipeline.advance(jobs)
            clock.append(time.perf_counter())
            pipeline.finish(jobs)
            clock.append(time.perf_counter())
            if repeat:  # shapes are planned the first time
                for part, began, ended in zip(spent, clock, clock[1:], strict=False):
                    spent[part][images - 1].append((ended - began) / (ROUNDS if part == "round" else 1))
    medians = {part: tuple(statistics.median(of) for of in by) for part, by in spent.items()}
    return Rates(medians["prepare"], medians["round"], medians["finish"])


def table_of(rates: Rates, steps: Sequence[int]) -> Table:
    """What was measured, and the capacity that follows."""
    table = Table("images side by side", *map(str, range(1, rates.most + 1)), title="Seconds of an engine, in ms")
    for part in ("prepare", "round", "finish"):
        table.add_row(part, *(f"{1000 * value:.1f}" for value in getattr(rates, part)))
    table.add_row("images/s", *(f"{rates.per_second(steps, n):.1f}" for n in range(1, rates.most + 1)))
    return table


def predicted_row(rates: Rates, steps: Sequence[int], rate: float) -> list[str]:
    """Arrivals, share of capacity, mean by the formula, mean and 95th percentile of the rounds, by steps."""
    formula = predict(rates, steps, rate)
    row = [f"{rate:.1f}", f"{formula.utilisation:.2f}", f"{formula.mean:.3f}"]
    if formula.utilisation >= 1:
        return [*row, *["grows without end"] * len(set(steps))]
    found = simulated(rates, steps, rate)
    return [*row, *(f"{statistics.fmean(found[s]):.3f}, {percentile(found[s], 0.95):.3f}" for s in sorted(set(steps)))]


def main() -> None:
    """Measure, predict, print; leave build/peers/queueing.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.serving.queueing",
                                     description="Measure a bundle's seconds by the number of images side by side, and "
                                     "predict a server's capacity and latencies from them.")
    parser.add_argument("bundle", type=Path, help="bundle of the model that will be served")
    parser.add_argument("--rates", type=numbers, help="requests a second, separated by commas; default: shares of the "
                        "capacity")
    parser.add_argument("--steps", type=lambda text: tuple(map(int, text.split(","))), default=STEPS,
                        help="steps of the requests, all equally often; default 4,10,25")
    parser.add_argument("--most", type=int, default=MOST, help="images side by side, as --batch of the server")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is every core")
    parser.add_argument("--json", action="store_true", help="print what was measured, and nothing else")
    options = parser.parse_args()
    rates = measure(options.bundle, options.threads, options.most)
    if options.json:
        print(json.dumps(asdict(rates)))
        return
    capacity = rates.per_second(options.steps, rates.most)
    report: dict[str, Any] = new_report(measured=asdict(rates), capacity=capacity, steps=options.steps)
    wanted = options.rates or [share * capacity for share in (0.3, 0.5, 0.7, 0.8, 0.9)]
    kinds = (f"{steps} steps: mean, p95" for steps in sorted(set(options.steps)))
    table = Table("requests/s", "of capacity", "mean, s", *kinds, title="Predicted latency in seconds, without HTTP")
    for rate in wanted:
        row = predicted_row(rates, options.steps, rate)
        report["rows"][f"{rate:.3f}"] = row
        table.add_row(*row)
    file = save(report, "queueing")
    show(report, table_of(rates, options.steps), file, 120)
    show(report, table, file, 120)


def numbers(text: str) -> list[float]:
    """Of a list with commas."""
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
