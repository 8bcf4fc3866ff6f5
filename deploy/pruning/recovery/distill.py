"""Teaches a pruned U-Net to answer like the one it was cut from, along the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.pruning.recovery.training_loop import Schedule
from deploy.pruning.teacher.block_activity import Observed
from deploy.pruning.teacher.denoising_runs import Trajectories
from deploy.pruning.teacher.replay import Replay


@dataclass(frozen=True)
class Recipe(Schedule):
    """How a pruned U-Net is trained.

    Attributes:
        feature_weight: of the feature loss against the prediction loss.
        guided_weight: of the error of the guided prediction, which is what the sampler uses.
        memory: calls of the teacher's trajectories that are learned from in mixed order.
    """

    feature_weight: float = 0.05
    guided_weight: float = 0.2
    memory: int = 1024


class Distillation:
    """The task of a pruned U-Net (`deploy.pruning.recovery.training_loop.Task`).

    The loss: mean squared error of the prediction for both branches of classifier-free guidance and of the guided
    prediction, each in units of the teacher's variance (output distillation as in BK-SDM, arXiv:2305.15798, eq. 2),
    plus attention transfer between blocks (Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2): where in the image
    each block is active must match, whatever number of channels it is active with.

    Every array is one of `Replay`, features or indices of its shapes and dtypes, or the loss, a float32 scalar.

    Args:
        student, teacher: networks with diffusers' block names, on the trajectories' device; the teacher is frozen.
        trajectories: of the teacher; made with `observed(teacher)` as its teacher.
        recipe: weights of the losses.
        guidance_scale: of the guided error.
    """

    def __init__(self, student: nn.Module, teacher: Observed, trajectories: Trajectories, recipe: Recipe,
                 guidance_scale: float) -> None:
        self.network = student
        self._replay = Replay(teacher, trajectories, recipe.memory, recipe.seed)
        self._student, self._recipe, self._guidance = Observed(student), recipe, guidance_scale

    def loss(self) -> tuple[Tensor, float]:
        """The loss of a mixed batch, a scalar, and the prediction's error relative to the teacher's variance."""
        batch, wanted = self._replay.mixed()
        with self._student.recording() as found:
            output = self._student(batch.sample, batch.timestep, batch.states)
        scale = batch.output.var()
        prediction = F.mse_loss(output, batch.output) / scale
        asked, unasked = (output - batch.output).chunk(2)
        guided = (unasked + self._guidance * (asked - unasked)).square().mean() / scale
        features = torch.stack([(found[name] - wanted[name]).square().mean() for name in wanted if name in found]).sum()
        recipe = self._recipe
        loss = prediction + recipe.guided_weight * guided + recipe.feature_weight * features
        return loss, prediction.item()

    def state(self) -> dict[str, Tensor]:
        """Where the trajectories are, and what is remembered of them."""
        return self._replay.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self._replay.restore(tensors)
