"""Generates a set of prompts with any pipeline and records the latents of every step, to compare two pipelines by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.pipeline.diffusion import Pipeline, Step
from runtimes.pipeline.loading import load_tokenizers, scheduler_config


@dataclass(frozen=True)
class TrajectoryRequest:
    """What to sample; equal requests give equal initial latents and, from samplers that sample noise, equal noise.

    Attributes:
        prompts: one image each.
        scheduler: key of `runtimes.schedulers.SCHEDULERS`.
        seed: of the first image, the others counting on from it.
        height, width: pixels; the pipeline's default if None.
        images_at_once: how many images share a batch.
        keep_latents: whether the latents of every step are wanted.
        cache_interval: see `Pipeline.__call__`.
    """

    prompts: tuple[str, ...]
    scheduler: str
    steps: int
    guidance_scale: float
    seed: int
    height: int | None = None
    width: int | None = None
    images_at_once: int = 8
    keep_latents: bool = True
    cache_interval: int = 1


@dataclass(frozen=True)
class Trajectory:
    """A generated request.

    Attributes:
        latents: (steps, B, C, H/f, W/f) float32 after each step, or (0,) if they were not wanted.
        images: (B, H, W, 3) float32, pixels in 0..1.

    Every array that is stored keeps its shape and dtype: latents and pixels as the attributes say.
    """

    latents: np.ndarray[Any, Any]
    images: np.ndarray[Any, Any]

    def to_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The attributes by name, for `Store`."""
        return {"latents": self.latents, "images": self.images}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Trajectory:
        """The trajectory whose `to_arrays` a `Store` holds."""
        return cls(arrays["latents"], arrays["images"])


def assemble_pipeline(
    sessions: Mapping[str, Session], bundle: Bundle, scheduler: Mapping[str, Any] | None = None
) -> Pipeline:
    """A pipeline over given sessions with the bundle's facts, tokenizer and, unless given, scheduler config.

    Raises:
        BundleError: tokenizer or scheduler config cannot be read.
        InputError: the scheduler config is unknown or contradicts itself.
    """
    config = scheduler_config(bundle) if scheduler is None else scheduler
    return Pipeline(sessions, bundle.manifest.pipeline, config, *load_tokenizers(bundle))


def generate(pipeline: Pipeline, request: TrajectoryRequest) -> Trajectory:
    """Generate a request.

    Raises:
        DeployError: the pipeline refuses it, or its numbers are not finite.
    """
    parts = []
    for first in range(0, len(request.prompts), request.images_at_once):
        prompts = request.prompts[first : first + request.images_at_once]
        parts.append(_generate_batch(pipeline, replace(request, prompts=prompts, seed=request.seed + first)))
    latents = [p.latents for p in parts]
    return Trajectory(np.concatenate(latents, axis=1) if request.keep_latents else np.empty(0, np.float32),
                   np.concatenate([p.images for p in parts]))


def _generate_batch(pipeline: Pipeline, request: TrajectoryRequest) -> Trajectory:
    latents: list[np.ndarray[Any, Any]] = []

    def keep(step: Step) -> None:
        latents.append(step.latents.copy())

    prompts = request.prompts if pipeline.roles.encoders else [""] * len(request.prompts)
    images = pipeline(
        prompts, steps=request.steps, guidance_scale=request.guidance_scale, seed=request.seed,
        height=request.height, width=request.width, scheduler=request.scheduler, cache_interval=request.cache_interval,
        output="numpy",
        on_step=keep if request.keep_latents else None,
    )
    return Trajectory(np.stack(latents) if latents else np.empty(0, np.float32), images)
