"""Random schedules of jobs that join, leave, are cancelled or fail, and what each survivor makes alone elsewhere.

    python -m tests.runtimes.schedules --schedules 300                 # over a bundle of a few nodes, made for it
    python -m tests.runtimes.schedules --bundle BUNDLE --schedules 40  # over networks; prints the least equality in dB
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from runtimes.errors import CancelledError
from runtimes.inputs.request import Request
from runtimes.inputs.resolved_request import pixel_limits
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.job import Job, Step
from runtimes.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
LEAST_DB = 100.0  # at fp32, where a component's rows depend on their number
FATES = ("live", "live", "live", "cancel", "raise", "stop", "overflow")
WORDS = ("a red apple", "cat", "", "a star")


@dataclass(frozen=True)
class Wanted:
    """One job of a schedule.

    Attributes:
        fields: of its request, as JSON holds them; arrays stand as their seeds, see `request_of`.
        fate: what happens to it, one of `FATES`.
        at: the step at which it does.
    """

    fields: dict[str, Any]
    fate: str = "live"
    at: int = 0


@dataclass
class Outcome:
    """How the jobs of schedules ended.

    Attributes:
        survivors: fields of the requests that came through, and their results.
        ended: how many ended by each fate.
        most: the most jobs that were under way at a time.
    """

    survivors: list[tuple[dict[str, Any], np.ndarray]] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    most: int = 0


class Raised(Exception):
    """What a job's hook raises."""


def request_of(fields: dict[str, Any], roles: Any) -> Request:
    """The request of a job, with arrays for the seeds that stand for them."""
    made, factor = dict(fields), roles.codec.factor
    height, width = made.get("height", roles.codec.height), made.get("width", roles.codec.width)
    for name in {"image", "mask", "latents"} & set(made):
        draw = np.random.default_rng(made[name] if made[name] != "overflow" else 0)
        if name == "image":
            made[name] = draw.random((height, width, 3))
        elif name == "mask":
            made[name] = (draw.random((height, width)) < 0.5).astype(np.float32)
        else:
            shape = (len(made["seed"]), roles.codec.latent_channels, height // factor, width // factor)
            made[name] = (np.full(shape, 3e38, np.float32) if made[name] == "overflow"
                          else draw.standard_normal(shape, np.float32))
    return Request.from_mapping(made)


def random_job(draw: random.Random, roles: Any, sizes: Sequence[int], number: int) -> Wanted:
    """Any request that a bundle can do; samplers come in turn, so that none is missing."""
    name, images = list(SCHEDULERS)[number % len(SCHEDULERS)], draw.choice((1, 1, 1, 2, 3))
    fields: dict[str, Any] = {
        "prompt": draw.choice(WORDS), "steps": draw.randint(4, 8), "scheduler": name, "images_per_prompt": images,
        "seed": [draw.randrange(10**6) for _ in range(images)], "guidance_scale": draw.choice((1.0, 2.5, 7.5)),
        "height": draw.choice(sizes), "width": draw.choice(sizes), "output": draw.choice(("numpy", "latents"))}
    if draw.random() < 0.3:
        fields["negative_prompt"] = draw.choice(WORDS)
    if draw.random() < 0.3:
        fields |= {"guidance_interval": [0.2, 0.8], "guidance_rescale": draw.choice((0.0, 0.7))}
    if draw.random() < 0.3:
        fields |= {"image": draw.randrange(99), "strength": draw.choice((0.6, 0.9))}
        if draw.random() < 0.5:
            fields["mask"] = draw.randrange(99)
    elif draw.random() < 0.2:
        fields["latents"] = draw.randrange(99)
    if roles.denoiser.shallow is not None and draw.random() < 0.4:
        fields["cache_interval"] = draw.choice((2, 3))
    if draw.random() < 0.15:
        fields |= {"tile": min(sizes), "height": max(sizes), "width": max(sizes)}
    if name in ("ddim", "tcd"):
        fields["eta"] = draw.choice((0.0, 0.7))
    fate = draw.choice(FATES)
    if fate == "overflow":
        fields = {**{k: v for k, v in fields.items() if k not in ("image", "mask", "strength")}, "latents": "overflow"}
    return Wanted(fields, fate, draw.randint(0, 3))


def play(pipeline: Pipeline, draw: random.Random, jobs: Sequence[Wanted], outcome: Outcome) -> None:
    """One schedule: jobs join a few at a time, any of those under way are advanced, those that are done leave."""
    waiting, live = list(jobs), dict[Job, Wanted]()
    while waiting or live:
        for _ in range(min(draw.choice((0, 1, 1, 2)) + (not live), len(waiting))):
            wanted = waiting.pop()
            [job] = pipeline.prepare([request_of(wanted.fields, pipeline.roles)], on_step=hook(wanted))
            live[job] = wanted
        if len(waiting) > 1 and draw.random() < 0.3:
            pair = [waiting.pop(), waiting.pop()]
            requests = [request_of(one.fields, pipeline.roles) for one in pair]
            live |= zip(pipeline.prepare(requests), (Wanted(one.fields) if one.fate in ("raise", "stop") else one
                                                     for one in pair), strict=True)
        outcome.most = max(outcome.most, len(live))
        for job, wanted in live.items():
            if wanted.fate == "cancel" and job.index >= wanted.at:
                job.cancel()
        pipeline.advance(draw.sample(list(live), draw.randint(1, len(live))))
        done = [job for job in live if job.done and draw.random() < 0.7]
        for job, result in zip(done, pipeline.finish(done), strict=True):
            leave(job, live.pop(job), result, outcome)


def hook(wanted: Wanted) -> Any:
    """What is called after the steps of a job that a hook ends."""
    if wanted.fate not in ("raise", "stop"):
        return None

    def on_step(step: Step) -> bool:
        if step.index >= wanted.at:
            if wanted.fate == "raise":
                raise Raised
            return False
        return True

    return on_step


def leave(job: Job, wanted: Wanted, result: Any, outcome: Outcome) -> None:
    """Check how a job ended, and remember what it made."""
    if job.error is None:
        outcome.survivors.append((wanted.fields, np.asarray(result)))
        how = "finished"
        assert wanted.fate == "live" or job.total <= wanted.at + 1, f"{wanted} came through"
    else:
        how, expected = type(job.error).__name__, {
            "cancel": CancelledError, "stop": CancelledError, "raise": Raised, "overflow": runtimes.ParityError}
        assert isinstance(job.error, expected.get(wanted.fate, ())), f"{wanted}: {job.error!r}"
        assert len(result) == 0
    outcome.ended[how] = outcome.ended.get(how, 0) + 1


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Energy of the first over that of the difference; infinite where they are equal bit for bit."""
    if np.array_equal(one, other):
        return math.inf
    difference = np.square(one.astype(np.float64) - other).mean()
    return 10 * math.log10(np.square(one.astype(np.float64)).mean() / difference)


def run_alone(bundle: Path, fields: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """What another process makes of each request alone."""
    with tempfile.TemporaryDirectory() as folder:
        asked, made = Path(folder) / "asked.json", Path(folder) / "made.npz"
        asked.write_text(json.dumps(list(fields)))
        subprocess.run([sys.executable, "-m", "tests.runtimes.schedules", "--bundle", str(bundle), "--alone",
                        str(asked), str(made)], cwd=ROOT, check=True)
        with np.load(made) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(fields))]


def compare(bundle: Path, schedules: int, seed: int = 0, jobs: int = 7) -> tuple[float, Outcome]:
    """Play schedules; the least equality of a survivor with its lone run in dB, and how all ended."""
    pipeline, outcome, draw = runtimes.load(bundle, threads=1), Outcome(), random.Random(seed)
    _, multiple = pixel_limits(pipeline.roles, pipeline.sessions, "height")
    sizes = pipeline.roles.codec.height, pipeline.roles.codec.height + multiple
    for number in range(schedules):
        play(pipeline, draw, [random_job(draw, pipeline.roles, sizes, number * jobs + i) for i in range(jobs)], outcome)
    alone = run_alone(bundle, [fields for fields, _ in outcome.survivors])
    return min(decibels(result, made) for (_, result), made in zip(outcome.survivors, alone, strict=True)), outcome


def main() -> None:
    """Play schedules and print how they ended, or be the other process."""
    parser = argparse.ArgumentParser(prog="python -m tests.runtimes.schedules",
                                     description="Play random schedules of jobs that share calls, and compare every "
                                     "survivor with its lone run in another process.")
    parser.add_argument("--bundle", type=Path, help="default: one of a few nodes, made for it")
    parser.add_argument("--schedules", type=int, default=300, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules")
    parser.add_argument("--alone", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        pipeline = runtimes.load(options.bundle, threads=1)
        requests = [request_of(fields, pipeline.roles) for fields in json.loads(options.alone[0].read_text())]
        np.savez(options.alone[1], *[np.asarray(pipeline(request)) for request in requests])
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or make_bundle(Path(folder))
        least, outcome = compare(bundle, options.schedules, options.seed)
    print(f"{options.schedules} schedules, up to {outcome.most} jobs at a time; {outcome.ended}; the least equality of "
          f"{len(outcome.survivors)} survivors with their lone runs: "
          f"{'the same bits' if math.isinf(least) else f'{least:.1f} dB'}")
    if least < LEAST_DB:
        raise SystemExit(1)


def make_bundle(folder: Path) -> Path:
    """A bundle of a few nodes, whose denoiser has a shallow entry."""
    from transformers import CLIPTokenizer

    from runtimes.text.clip_tokenizer import prepare_tokenizer
    from tests.runtimes.fakes import TOKENS, write_pipeline_bundle
    from tests.runtimes.vocabulary import make_vocabulary

    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS).save_pretrained(folder / "source")
    prepare_tokenizer(folder / "source", folder / "bundle" / "tokenizer")
    return write_pipeline_bundle(folder / "bundle", len(vocab) + 1, shallow=True).path


if __name__ == "__main__":
    main()
