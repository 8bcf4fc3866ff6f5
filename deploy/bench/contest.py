"""Runs `bench`: bundles, and PyTorch beside them, generate in turns (A B A B ...), each in a process of its own.

A machine that slows down slows all of them, so a reported ratio is the median of the quotients within rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.machine_limits import bandwidth, gemm_flops
from deploy.bench.worker_client import Worker
from deploy.core.doctor import machine
from deploy.parity.metrics import psnr_db
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError, UnavailableError
from runtimes.system.device import CPU, Device
from runtimes.system.progress import listener

KINDS = {"torch": "eager", "torch.compile": "compile"}
SETTLE_SECONDS = 0.25  # thread pools spin for a while after a run, and would take the next one's cores
PROMPTS = ("a red apple", "a cat", "a house", "the sun", "a bicycle", "a tree", "a fish", "a clock")


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        against: of KINDS: PyTorch beside the bundles, from the source of the first.
        rounds: interleaved images of each contestant that count, after one that does not.
        steps, guidance_scale: of every image.
        batches: batch sizes to sweep, images at once; the first is what everything else is measured at.
        threads: CPU threads of every contestant; 0 = all cores.
        device: where the bundles run.
    """

    against: tuple[str, ...] = ()
    rounds: int = 7
    steps: int = 25
    guidance_scale: float = 7.5
    batches: tuple[int, ...] = (1,)
    threads: int = 0
    device: Device = CPU

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.against) - set(KINDS)):
            raise InputError(f"cannot compare with {unknown[0]!r}", where="--against", fix=f"one of {', '.join(KINDS)}")
        if self.rounds < 1 or self.steps < 1 or not self.batches or min(self.batches) < 1:
            raise InputError("rounds, steps and batches are at least 1", where="bench")


def run_bench(bundles: Sequence[Path], options: BenchOptions) -> dict[str, Any]:
    """Measure.

    Args:
        bundles: folders; the first is what the ratios are against.
        options: how.

    Returns:
        the object of `bench --json`.

    Raises:
        BundleError: a folder is no bundle.
        UnavailableError: a contestant cannot run here.
    """
    opened = [Bundle.open(path) for path in bundles]
    names = _names([bundle.path for bundle in opened])
    threads = options.threads or os.cpu_count() or 1
    commands = {name: _bundle_command(bundle, threads, options.device)
                for name, bundle in zip(names, opened, strict=True)}
    commands |= {kind: _torch_command(opened[0], threads, KINDS[kind]) for kind in options.against}
    report: dict[str, Any] = {
        "machine": machine(), "settings": {"rounds": options.rounds, "steps": options.steps, "threads": threads,
                                           "guidance_scale": options.guidance_scale, "device": str(options.device)},
        "load_before": os.getloadavg()[0]}
    listener().working("measuring what this machine can do")
    report["limits"] = {"gemm_gflops": gemm_flops() / 1e9, "copy_gigabytes_per_second": bandwidth() / 1e9}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
        contest = _Contest(workers, opened[0], options, Path(folder))
        try:
            for name, command in commands.items():
                listener().working(f"starting {name}")
                workers[name] = Worker(name, command, threads)
            report["runs"] = contest.run()
            report["ratios"] = contest.ratios(names[0])
            report["batches"] = contest.sweep()
        finally:
            for worker in workers.values():
                worker.close()
    for run, bundle in zip(report["runs"], opened, strict=False):
        run["limits"] = _share_of_limits(run, bundle, report["limits"], options)
    report["load_after"] = os.getloadavg()[0]
    return report


class _Contest:
    """The workers taking turns; holds what the parts of one measurement share."""

    def __init__(self, workers: Mapping[str, Worker], bundle: Bundle, options: BenchOptions, folder: Path) -> None:
        self.workers, self.options, self.folder = workers, options, folder
        codec = bundle.manifest.pipeline.codec
        self.shape = (codec.latent_channels, codec.height // codec.factor, codec.width // codec.factor)
        self.seconds: dict[str, list[float]] = {}

    def run(self) -> list[dict[str, Any]]:
        """The images at the first batch size: seconds, components, memory, start, and how equal the images are."""
        batch = self.options.batches[0]
        first = {name: self._generate(worker, 0, batch) for name, worker in self.workers.items()}
        replies: dict[str, list[dict[str, Any]]] = {name: [] for name in self.workers}
        decibels: dict[str, list[float]] = {name: [] for name in self.workers}
        for number in range(1, self.options.rounds + 1):
            images = {}
            for name, worker in self.workers.items():
                replies[name].append(self._generate(worker, number, batch))
                images[name] = np.load(self.folder / "image.npy")
            standard = images.get("torch", next(iter(images.values())))
            for name, image in images.items():
                decibels[name].append(psnr_db(standard, image, 255.0) if image.shape == standard.shape else 0.0)
            listener().finished(f"round {number} of {self.options.rounds}: "
                                + ", ".join(f"{name} {r[-1]['seconds']:.3f} s" for name, r in replies.items()))
        self.seconds = {name: [reply["seconds"] for reply in r] for name, r in replies.items()}
        return [{"name": name, "seconds": spread(self.seconds[name]),
                 "components": _components(r), "peak_rss_bytes": r[-1]["peak_rss_bytes"],
                 "cold_start_seconds": self.workers[name].start_seconds + first[name]["seconds"],
                 "psnr_db": min(min(decibels[name]), 99.0)} for name, r in replies.items()]

    def ratios(self, base: str) -> dict[str, Any]:
        """Seconds of each contestant divided by those of `base` in the same round: above 1 is slower than it."""
        return {name: spread([a / b for a, b in zip(seconds, self.seconds[base], strict=True)])
                for name, seconds in self.seconds.items() if name != base}

    def sweep(self) -> list[dict[str, Any]]:
        """Seconds per image at every batch size, two interleaved images after a first that does not count."""
        found = []
        for batch in self.options.batches:
            seconds: dict[str, list[float]] = {name: [] for name in self.workers}
            for number in range(3):
                for name, worker in self.workers.items():
                    reply = self._generate(worker, number, batch)
                    seconds[name] += [reply["seconds"] / batch] if number else []
            found.append({"batch": batch, "seconds_per_image": {n: min(s) for n, s in seconds.items()}})
        return found

    def _generate(self, worker: Worker, number: int, batch: int) -> dict[str, Any]:
        time.sleep(SETTLE_SECONDS)
        latents = self.folder / "latents.npy"
        np.save(latents, np.random.default_rng(number).standard_normal((batch, *self.shape), np.float32))
        # No prompt comes twice: nobody's cache of embedded prompts helps.
        prompts = [f"{PROMPTS[i % len(PROMPTS)]} {number} {i}" for i in range(batch)]
        return worker.ask("generate", prompts=prompts, latents=str(latents), steps=self.options.steps,
                          guidance=self.options.guidance_scale, save=str(self.folder / "image.npy"))


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def _components(replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of a call and share of each component, and of what is left to Python."""
    profiles = [reply["profile"] for reply in replies]
    total = sum(p["total"] for p in profiles)
    parts = {name: sum(p["components"][name] for p in profiles) for name in profiles[0]["components"]}
    parts["python"] = sum(p["python"] for p in profiles)
    return {name: {"seconds": seconds / len(profiles), "share": seconds / total} for name, seconds in parts.items()}


def _share_of_limits(run: Mapping[str, Any], bundle: Bundle, limits: Mapping[str, float],
                     options: BenchOptions) -> dict[str, float]:
    """How far the denoiser is from the machine's arithmetic, and its weights from the machine's memory."""
    name = bundle.manifest.pipeline.denoiser.component
    network = bundle.component(name)
    rows = options.batches[0] * (2 if options.guidance_scale > 1 else 1)
    calls = options.steps * -(-rows // network.axes["batch"].range.max)
    seconds = run["components"][name]["seconds"]
    result = {"weight_gigabytes_per_second": network.bytes * calls / seconds / 1e9}
    if (macs := network.graph.macs) is not None:
        flops = 2 * macs * rows / network.axes["batch"].range.opt * options.steps
        result |= {"unet_gflops": flops / seconds / 1e9,
                   "share_of_gemm_peak": flops / seconds / 1e9 / limits["gemm_gflops"]}
    return result


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or whole paths where two are alike."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _bundle_command(bundle: Bundle, threads: int, device: Device) -> list[str]:
    return [sys.executable, "-m", "deploy.bench.child_bundle", str(bundle.path.resolve()), str(threads),
            str(device)]


def _torch_command(bundle: Bundle, threads: int, kind: str) -> list[str]:
    from deploy.building.verify import source_of
    from deploy.model.hub import is_name
    from deploy.model.source_folder import model_folder

    model = source_of(bundle)
    folder = model_folder(model, bundle.manifest.source.revision if is_name(model) else "").resolve()
    if not folder.is_dir():
        raise UnavailableError(f"the source model {folder} is not here", where="--against")
    return [sys.executable, "-W", "ignore", "-m", "deploy.bench.child_torch", str(folder), str(threads), kind]
