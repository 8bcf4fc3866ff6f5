"""Runs `tradeoffs`: measures time and accuracy of the sampling loop's settings on one bundle, for its presets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploy.parity.comparison_options import gallery_for, options_for
from runtimes.bundle.folder import Bundle
from runtimes.inputs.quality_presets import Measured, Setting
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.loading import load
from runtimes.system.device import CPU, Device
from runtimes.system.progress import listener

LONG_STEPS = 50
TIMED_ROUNDS = 5
LIMITED = (0.1, 0.7)  # guided steps: not the noisiest tenth nor the last third, about what arXiv 2404.07724 found best
Float32 = np.ndarray[Any, np.dtype[np.float32]]


def candidates(bundle: Bundle) -> list[Setting]:
    """Settings worth measuring: the bundle's own sampler and DPM-Solver++ in few steps, each with what saves work.

    Under limited guidance fewer steps are enough: what breaks first in a short run is what guidance overshoots.
    """
    caches = (1, 2, 3) if bundle.manifest.pipeline.denoiser.shallow else (1,)
    settings = [Setting(25, cache_interval=n) for n in caches]
    settings += [Setting(25, guidance_interval=LIMITED, cache_interval=caches[-1])]
    settings += [Setting(steps, "dpm++", cache_interval=n) for steps in (20, 12, 8) for n in caches[:2]]
    settings += [Setting(steps, "dpm++", LIMITED, n) for steps in (12, 8) for n in caches[:2]]
    return settings + [Setting(steps, "dpm++", LIMITED) for steps in (6, 4)]


def measure(
    bundle: Bundle, *, images: int = 100, device: Device = CPU, threads: int = 0,
) -> list[Measured]:
    """Generate the same prompts from the same noise with every setting, then time one image in interleaved rounds.

    Args:
        bundle: any bundle.
        images: how many are generated with each setting, of subjects spread over the gallery where there is one.
        device, threads: as for `runtimes.load`.
    """
    pipeline = load(bundle, device=device, threads=threads)
    settings = candidates(bundle)
    gallery = gallery_for(bundle.manifest.source.id)
    known = options_for(bundle.manifest.source.id, ()).prompts if gallery is None else gallery.names
    prompts = [known[round(i * len(known) / images) % len(known)] for i in range(images)]
    reference = _generate(pipeline, prompts, Setting(LONG_STEPS))
    accuracy = []
    for setting in settings:
        generated = _generate(pipeline, prompts, setting)
        psnr = float(np.mean([_psnr(a, b) for a, b in zip(reference, generated, strict=True)]))
        accuracy.append((psnr, None if gallery is None else gallery.score(generated, prompts)))
    listener().working("timing")
    milliseconds = _timed(pipeline, prompts[0], settings)
    return [Measured(s, ms, psnr, found)
            for s, ms, (psnr, found) in zip(settings, milliseconds, accuracy, strict=True)]


def _generate(pipeline: Pipeline, prompts: Sequence[str], setting: Setting) -> Float32:
    """(N, H, W, 3) float32 in 0..1, image i from seed i."""
    listener().working(f"generating with {setting}")
    parts = [pipeline(prompts[i : i + 8], seed=i, output="numpy", **setting.options())
             for i in range(0, len(prompts), 8)]
    return np.concatenate(parts)


def _timed(pipeline: Pipeline, prompt: str, settings: Sequence[Setting]) -> list[float]:
    """Median milliseconds of one image; rounds interleave, so that a machine that slows down slows all."""
    seconds: list[list[float]] = [[] for _ in settings]
    for _ in range(TIMED_ROUNDS):
        for setting, own in zip(settings, seconds, strict=True):
            began = time.perf_counter()
            pipeline(prompt, seed=0, **setting.options())
            own.append(time.perf_counter() - began)
    return [1000 * statistics.median(own) for own in seconds]


def _psnr(a: Float32, b: Float32) -> float:
    return float(-10 * np.log10(max(float(np.mean((a - b) ** 2)), 1e-10)))
