"""Scores how much each channel of a coupled group matters: by magnitude, or by the loss along the trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.pruning.teacher.original import Teacher

Method = Literal["l1", "l2", "taylor"]
TIMESTEPS, GENERATED_AT_ONCE = 25, 16


def scorer_of(method: Method) -> Callable[[Any], Tensor]:
    """A function from a group of torch-pruning to scores, (N,) float32, comparable between channels of one group.

    l1: Li et al. 2017, arXiv:1608.08710; l2: He et al. 2018, arXiv:1808.06866, both summed over all coupled layers
    (arXiv:2301.12900). taylor: |weight x gradient| (Molchanov et al. 2019, arXiv:1906.10771), of the gradients that
    `accumulate_gradients` left.
    """
    if method == "taylor":
        scorer = torch_pruning.importance.GroupTaylorImportance()
    else:
        scorer = torch_pruning.importance.GroupMagnitudeImportance(p={"l1": 1, "l2": 2}[method])
    return scorer  # type: ignore[no-any-return]


def accumulate_gradients(network: nn.Module, teacher: Teacher, *, images: int = 64, threshold: float = 0.05,
                         seed: int = 0) -> None:
    """Leave the gradient of the denoising loss over all timesteps in `.grad` of every parameter.

    Diff-Pruning (Fang et al. 2023, arXiv:2305.10924): the losses of timesteps far below the largest say nothing
    about content and are left out. The images that are noised are the teacher's own, so no data is needed.

    Args:
        network: holds the parameters; called as diffusers calls a UNet2DConditionModel.
        teacher: generates the images.
        images: how many to generate.
        threshold: a timestep counts if its loss is at least this share of the largest.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    trajectories = teacher.trajectories(min(images, GENERATED_AT_ONCE), seed)
    originals = trajectories.generate(images)
    device, diffusion = originals.device, teacher.diffusion
    states = teacher.prompts[torch.randint(len(teacher.prompts), (images,), generator=generator).to(device)]
    noise = torch.randn(originals.shape, generator=generator).to(device)

    def loss_at(timestep: int, part: slice) -> Tensor:
        original = originals[part]
        steps = torch.full((len(original),), timestep, device=device)
        output = network(diffusion.noised(original, noise[part], steps), steps, states[part], return_dict=False)[0]
        return F.mse_loss(output, diffusion.target(original, noise[part], steps))

    parts = [slice(i, i + GENERATED_AT_ONCE) for i in range(0, images, GENERATED_AT_ONCE)]
    last = len(diffusion.alphas) - 1
    timesteps = [round(last * (i + 0.5) / TIMESTEPS) for i in range(TIMESTEPS)]
    with torch.no_grad():
        losses = [sum(float(loss_at(t, part)) for part in parts) for t in timesteps]
    network.requires_grad_(True)
    for timestep, loss in zip(timesteps, losses, strict=True):
        if loss >= threshold * max(losses):
            for part in parts:
                loss_at(timestep, part).backward()
    network.requires_grad_(False)
