"""Jobs of mixed steps advanced together against the same jobs one after another, in one run, by backend.

    python -m tests.peers.stepping build/reference-onnxruntime-fp32 build/reference-openvino-fp32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import runtimes
from runtimes.inputs.request import Request
from runtimes.pipeline.diffusion import Pipeline
from tests.peers.results import new_report, save, show

STEPS = (4, 10, 25)  # of the jobs, in turn
PROMPTS = ("a red apple", "a cat", "a house under a tree", "the moon")


def requests_of(jobs: int) -> list[Request]:
    """Jobs that differ in steps, prompt and seed."""
    return [Request(PROMPTS[i % len(PROMPTS)], steps=STEPS[i % len(STEPS)], seed=i, output="numpy")
            for i in range(jobs)]


def one_after_another(pipeline: Pipeline, requests: Sequence[Request]) -> tuple[list[Any], list[float]]:
    """The images, and when each was there, in seconds."""
    start, images, ends = time.perf_counter(), [], []
    for request in requests:
        images.append(pipeline(request))
        ends.append(time.perf_counter() - start)
    return images, ends


def together(pipeline: Pipeline, requests: Sequence[Request]) -> tuple[list[Any], list[float]]:
    """The same, advanced together; each is decoded as soon as it is done."""
    start = time.perf_counter()
    jobs = pipeline.prepare(requests)
    images, ends = dict[int, Any](), dict[int, float]()
    while len(images) < len(jobs):
        pipeline.advance(jobs)
        done = [i for i, job in enumerate(jobs) if job.done and i not in images]
        for i, result in zip(done, pipeline.finish([jobs[i] for i in done]), strict=True):
            images[i], ends[i] = result, time.perf_counter() - start
    return [images[i] for i in range(len(jobs))], [ends[i] for i in range(len(jobs))]


def measure(bundle: Path, jobs: int, rounds: int, threads: int) -> dict[str, Any]:
    """Both ways in turns; medians over the rounds."""
    pipeline, requests = runtimes.load(bundle, threads=threads), requests_of(jobs)
    ways: dict[str, Callable[..., tuple[list[Any], list[float]]]] = {"apart": one_after_another, "together": together}
    ends: dict[str, list[list[float]]] = {name: [] for name in ways}
    images = {name: way(pipeline, requests)[0] for name, way in ways.items()}  # shapes are planned here
    for number in range(rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            ends[name].append(ways[name](pipeline, requests)[1])
    short = [i for i, request in enumerate(requests) if request.steps == min(STEPS)]
    median = {name: statistics.median(max(one) for one in of) for name, of in ends.items()}
    waits = {name: statistics.median(max(one[i] for i in short) for one in of) for name, of in ends.items()}
    ratios = [max(a) / max(t) for a, t in zip(ends["apart"], ends["together"], strict=True)]
    return {"jobs": jobs, "seconds": median, "last_short_seconds": waits, "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "largest_difference": max(float(np.abs(a - b).max()) for a, b in zip(*images.values(), strict=True))}


def main() -> None:
    """Measure, print a table below the machine, and leave build/peers/stepping.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.stepping",
                                     description="Compare the throughput of jobs of 4, 10 and 25 steps that are "
                                     "advanced together with the same jobs one after another.")
    parser.add_argument("bundles", type=Path, nargs="+", help="bundles, one for each backend")
    parser.add_argument("--jobs", type=int, default=8, help="how many at a time")
    parser.add_argument("--rounds", type=int, default=9, help="pairs")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is every core")
    options = parser.parse_args()
    report = new_report(jobs=options.jobs, rounds=options.rounds, threads=options.threads)
    table = Table("bundle", "apart, s", "together, s", "images/s, ratio", "least, most", "last 4-step image, s",
                  "largest difference")
    for bundle in options.bundles:
        row = report["rows"][bundle.name] = measure(bundle, options.jobs, options.rounds, options.threads)
        seconds, waits = row["seconds"], row["last_short_seconds"]
        table.add_row(bundle.name, f"{seconds['apart']:.2f}", f"{seconds['together']:.2f}", f"{row['ratio']:.2f}",
                      f"{row['ratios'][0]:.2f}, {row['ratios'][1]:.2f}",
                      f"{waits['apart']:.2f} -> {waits['together']:.2f}", f"{row['largest_difference']:.1e}")
    show(report, table, save(report, "stepping"), 120)


if __name__ == "__main__":
    main()
