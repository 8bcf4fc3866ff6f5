"""Provides calibration data: chooses the prompts, and records the model's own denoising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Manifest
from runtimes.bundle.roles import Roles

if TYPE_CHECKING:
    from calibration.trajectory.recorder import Recording
    from deploy.core.spec import BuildSpec

DEFAULT_PROMPTS = 64


def plan_calibration(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What will be recorded, resolved; refuses too few samples before any work."""
    from calibration.trajectory.prompts import STEPS, STRENGTH, plan_episodes
    from deploy.parity.comparison_options import ParityOptions

    prompts = spec.calibration_prompts or default_prompts(before.source.id)
    episodes = plan_episodes(prompts, spec.calibration_samples)
    planned = {"prompts": list(prompts[: len(episodes) + 1]), "samples": spec.calibration_samples, "steps": STEPS,
               "strength": STRENGTH, "guidance_scale": ParityOptions.guidance_scale}
    # Only where it holds: what was made of other U-Nets stays in the cache.
    return {**planned, "inpaints": True} if takes_masks(before) else planned


def takes_masks(manifest: Manifest) -> bool:
    """Whether the U-Net is one for inpainting, which is calibrated with masks."""
    from runtimes.backends.batching import Listed
    from runtimes.pipeline.initial_latents import inpaints

    name = manifest.pipeline.denoiser.component
    denoiser = manifest.components.get(name)
    return denoiser is not None and inpaints(Listed(name, denoiser), manifest.pipeline)


def default_prompts(source_id: str) -> tuple[str, ...]:
    """The reference model's subjects that its retrieval score does not ask for; everyday things for other models."""
    from deploy.parity.comparison_options import options_for

    options = options_for(source_id, ())
    if not options.retrieval_prompts:
        return options.prompts
    from deploy.reference_models import subject_names

    scored = {*options.retrieval_prompts, *options.prompts}
    names = [name for name in subject_names() if name not in scored]
    return tuple(names[i * len(names) // DEFAULT_PROMPTS] for i in range(DEFAULT_PROMPTS))


def record_calibration(source: Bundle, calibration: Mapping[str, Any]) -> Recording:
    """Record the float32 graphs' inputs, or find the recording of an earlier build of the same graphs.

    Images have the size that the build's shapes call the most common.
    """
    from calibration.trajectory.prompts import plan_episodes
    from calibration.trajectory.recorder import record
    from deploy.core.pass_cache import pipeline_identity
    from deploy.parity.reference.trajectories import assemble_pipeline
    from runtimes.backends.session import SessionOptions
    from runtimes.pipeline.bundle_sessions import BundleSessions
    from runtimes.system.cache_root import cache_home

    steps, strength = calibration["steps"], calibration["strength"]
    episodes = plan_episodes(calibration["prompts"], calibration["samples"], steps=steps, strength=strength,
                             inpaints=calibration.get("inpaints", False))
    manifest = replace(source.manifest, pipeline=at_common_size(source.manifest))
    source = replace(source, manifest=manifest)
    identity = {"components": {n: c.sha256 for n, c in sorted(manifest.components.items())},
                **pipeline_identity(manifest)}
    return record(dict(BundleSessions(source, SessionOptions())), lambda sessions: assemble_pipeline(sessions, source),
                  episodes, cache_home() / "calibration", source=identity,
                  guidance_scale=calibration["guidance_scale"], timestep=manifest.pipeline.denoiser.timestep,
                  steps=steps, strength=strength)


def at_common_size(manifest: Manifest) -> Roles:
    """The roles with the image size that is the `opt` of the denoiser's axes, where those are dynamic."""
    roles = manifest.pipeline
    denoiser = manifest.components.get(roles.denoiser.component)
    if denoiser is None or not {"height", "width"} <= denoiser.axes.keys():
        return roles
    height, width = (roles.codec.factor * denoiser.axes[name].range.opt for name in ("height", "width"))
    return roles.sized(height, width)
