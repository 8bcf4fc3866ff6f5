"""Retrains one pruned network of a bundle, with its checkpoint in the cache."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deploy.core.pass_cache import pipeline_identity
from deploy.core.pruning_options import TRAJECTORIES
from deploy.pruning.recovery.distill import Distillation, Recipe
from deploy.pruning.recovery.training_loop import Schedule, Task, Training
from deploy.pruning.shrink.prune_network import relative_error
from deploy.pruning.teacher.original import Teacher, load_source_module
from deploy.pruning.training_device import training_device
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import digest_of, to_json
from runtimes.system.cache_root import cache_home
from runtimes.system.progress import listener

JUDGED, JUDGED_SEED = 8, 7


def recover_denoiser(source: Bundle, name: str, teacher_name: str, config: Mapping[str, Any],
                     ) -> tuple[Any, dict[str, Any]]:
    """Let a pruned denoising network learn from the one it was cut from.

    Args:
        source: holds both, in the format "safetensors".
        name, teacher_name: of the two networks.
        config: of pass `recover`.

    Returns:
        the recovered network, and what the training did, JSON-able.

    Raises:
        ParityError: the loss is not finite.
    """
    device = training_device()
    student = load_source_module(source, source.component(name)).to(device)
    teacher = Teacher.load(source, teacher_name, config["prompts"], config["guidance_scale"], device)
    judged = teacher.trajectories(JUDGED, seed=JUDGED_SEED)
    batches = [judged.advance() for _ in range(16)]
    before = relative_error(student, batches)
    batch = config.get("batch", TRAJECTORIES)
    recipe = Recipe(config["steps"], accumulate=math.ceil(TRAJECTORIES / batch))
    weights = {n: source.component(n).sha256 for n in (name, teacher_name, *source.manifest.pipeline.encoders)}
    task = Distillation(student, teacher.observed, teacher.trajectories(batch, recipe.seed), recipe,
                        teacher.guidance_scale)
    key = {"weights": weights, "config": to_json(config), "pipeline": pipeline_identity(source.manifest)}
    network = train(task, recipe, key, keep_zeros=config["keep_zeros"])
    return network, {"steps": recipe.steps, "device": device, "relative_l2_before": round(before, 5),
                     "relative_l2_after": round(relative_error(network, batches), 5)}


def train(task: Task, schedule: Schedule, key: Mapping[str, Any], *, keep_zeros: bool = False) -> Any:
    """Train to the end, going on from where an earlier call with the same key was cut off.

    Args:
        task: what is learned.
        schedule: how long and how fast.
        key: what decides the result, JSON-able; names the folder of the checkpoint in the cache, which lies there
            until the last step.
        keep_zeros: weights that are zero stay zero.

    Raises:
        ParityError: the loss is not finite.
    """
    folder = cache_home() / "recover" / digest_of(key)
    task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster backwards
    training = Training(task, schedule, folder, keep_zeros=keep_zeros)
    listener().working("recover: learning from the original")
    if training.step:
        listener().finished(f"recover: going on from step {training.step} of {schedule.steps}")
    try:
        network = training.run(_report(schedule.steps))
    except KeyboardInterrupt:
        training.save()
        raise
    shutil.rmtree(folder)
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _report(steps: int) -> Callable[[int, float], None]:
    """Steps done and the error, smoothed, for who listens."""
    smooth = 0.0

    def report(step: int, error: float) -> None:
        nonlocal smooth
        smooth = error if not smooth else 0.95 * smooth + 0.05 * error
        listener().advanced(step, steps, f"steps of recovery, squared error {smooth:.4f} of the teacher's variance")

    return report
