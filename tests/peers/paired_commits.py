"""Two commits side by side in one run: the same images bit for bit, and the ratio of their times with its interval.

    git worktree add /tmp/before COMMIT                      # with a bundle that each commit built of the same model
    python -m tests.peers.paired_commits /tmp/before BUNDLE_BEFORE BUNDLE_NOW --rounds 40
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.core.doctor import machine
from runtimes.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
CALLS = 5  # of each request in each process
LIMIT = 1.03  # what the upper end of the interval must lie below
BASE: dict[str, Any] = {"prompt": "a red apple", "steps": 4, "seed": 3}
# Every mode and option whose arithmetic could have changed; sizes stand for arrays, see paired_worker.
REQUESTS: dict[str, dict[str, Any]] = {
    **{f"scheduler {name}": {"scheduler": name} for name in SCHEDULERS},
    "no guidance": {"guidance_scale": 1.0},
    "guidance rescaled": {"guidance_rescale": 0.7},
    "guidance for a part": {"steps": 8, "guidance_interval": [0.25, 0.75]},
    "a negative prompt": {"negative_prompt": "blue"},
    "three prompts, two images each": {"prompt": ["a cat", "a dog", "a house"], "images_per_prompt": 2},
    "more images than a call takes": {"images_per_prompt": 11, "steps": 2},
    "a list of seeds": {"prompt": ["a", "b"], "seed": [5, 99]},
    "eta": {"scheduler": "ddim", "eta": 0.6},
    "another size": {"height": 96, "width": 128},
    "an initial image": {"image": [64, 64, 3], "strength": 0.6},
    "an image and a mask": {"image": [64, 64, 3], "mask": [64, 64]},
    "a mask and half the strength": {"image": [64, 64, 3], "mask": [64, 64], "strength": 0.5},
    "initial latents": {"latents": [1, 8, 8, 8]},
    "tiles": {"height": 128, "width": 96, "tile": 64},
    "an image in tiles": {"height": 128, "width": 96, "tile": 64, "image": [128, 96, 3], "strength": 0.7},
    "a step cache": {"steps": 8, "cache_interval": 3},
    "a step cache and guidance for a part": {"steps": 8, "cache_interval": 3, "guidance_interval": [0.25, 0.75]},
    "tiles with a step cache": {"height": 128, "width": 96, "tile": 64, "steps": 6, "cache_interval": 2},
    "weighted words": {"prompt": "a (red:1.4) [apple]", "weighting": True},
    "the first part of a schedule": {"steps": 10, "part": [0.0, 0.5]},
}
TIMED: dict[str, dict[str, Any]] = {
    "25 steps, guided": {"steps": 25}, "4 steps": {"steps": 4},
    "4 images, 4 steps": {"steps": 4, "images_per_prompt": 4}, "10 steps, Heun": {"steps": 10, "scheduler": "heun"},
}


class Worker:
    """One commit's pipeline in a process of its own."""

    def __init__(self, tree: Path, bundle: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("paired_worker.py")), str(tree.resolve()),
                   str(bundle.resolve()), str(threads)]
        self._process = subprocess.Popen(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree.resolve())},
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Make the images of a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**BASE, **fields}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval, from the normal distribution of their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - 1.96 * error), math.exp(mean + 1.96 * error)


def compare_images(before: Worker, now: Worker) -> list[str]:
    """The requests whose images differ in a bit."""
    different = []
    for name, fields in REQUESTS.items():
        same = before.ask(fields)["sha256"] == now.ask(fields)["sha256"]
        different += [] if same else [name]
        print(f"  {'same bits' if same else 'DIFFERENT'}  {name}", flush=True)
    return different


def compare_times(start: Callable[[], tuple[Worker, Worker]], rounds: int, clock: str) -> list[str]:
    """The requests that may take longer than the limit; each round runs both, in turn the one and the other first.

    A process keeps its luck with memory for as long as it lives, so a round is a pair of new processes: their ratio is
    that of the medians of a few calls.
    """
    ratios: dict[str, list[float]] = {name: [] for name in TIMED}
    for number in range(rounds):
        before, now = start()
        order = (before, now) if number % 2 else (now, before)
        for name, fields in TIMED.items():
            for worker in order:
                worker.ask(fields)
            seconds: dict[Worker, list[float]] = {before: [], now: []}
            for turn in range(CALLS):
                for worker in order if turn % 2 else order[::-1]:
                    seconds[worker].append(worker.ask(fields)[clock])
            ratios[name].append(statistics.median(seconds[now]) / statistics.median(seconds[before]))
        before.close(), now.close()
    slow = []
    for name, found in ratios.items():
        mean, low, high = interval(found)
        slow += [name] if high >= LIMIT else []
        print(f"  now / before {mean:.4f} [{low:.4f}, {high:.4f}]  {name}, {rounds} pairs of processes", flush=True)
    return slow


def main() -> None:
    """Compare, print, and end with 1 where images differ or the time may have grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.paired_commits",
                                     description="Compare this tree with the tree of another commit in one run: images "
                                     "bit for bit, and seconds as a ratio with its 95 % interval.")
    parser.add_argument("before", type=Path, help="tree of the other commit, such as a git worktree")
    parser.add_argument("bundle_before", type=Path, help="bundle that the other commit built, with --step-cache")
    parser.add_argument("bundle_now", type=Path, help="bundle that this tree built of the same model")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of each request that is timed; 0 compares images")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="seconds that passed, or that the "
                        "process computed: where others use the machine, the second say more of one thread")
    options = parser.parse_args()

    def start() -> tuple[Worker, Worker]:
        return (Worker(options.before, options.bundle_before, options.threads),
                Worker(ROOT, options.bundle_now, options.threads))

    before, now = start()
    print(f"{machine()['processor']}, load {os.getloadavg()[0]:.1f}, {options.threads} thread(s) each")
    different = compare_images(before, now)
    before.close(), now.close()
    slow = compare_times(start, options.rounds, options.clock) if options.rounds else []
    if different or slow:
        raise SystemExit(f"different: {', '.join(different) or 'none'}; may be slower: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
