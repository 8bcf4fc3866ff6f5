"""What a pruned U-Net learns: to answer like the one it was cut from, along the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.pruning.training import Schedule
from deploy.pruning.trajectory import Trajectories

_FEATURES = ("down_blocks", "mid_block", "up_blocks")
_STATE = "trajectories."


@dataclass(frozen=True)
class Recipe(Schedule):
    """How a pruned U-Net is trained.

    Attributes:
        feature_weight: of the feature loss against the prediction loss.
        guided_weight: of the error of the guided prediction, which is what the sampler uses.
    """

    feature_weight: float = 0.05
    guided_weight: float = 0.2


class Distillation:
    """The task of a pruned U-Net (`deploy.pruning.training.Task`).

    The loss: mean squared error of the prediction for both branches of classifier-free guidance and of the guided
    prediction, each in units of the teacher's variance (output distillation as in BK-SDM, arXiv:2305.15798, eq. 2),
    plus attention transfer between blocks (Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2): where in the picture
    each block is active must match, whatever number of channels it is active with.

    Args:
        student, teacher: networks with diffusers' block names, on the trajectories' device; the teacher is frozen.
        trajectories: of the teacher; made with `observed(teacher)` as its teacher.
        recipe: weights of the losses.
        guidance_scale: of the guided error.
    """

    def __init__(self, student: nn.Module, teacher: Observed, trajectories: Trajectories, recipe: Recipe,
                 guidance_scale: float) -> None:
        self.network = student
        self._student, self._teacher, self._trajectories = Observed(student), teacher, trajectories
        self._recipe, self._guidance = recipe, guidance_scale

    def loss(self) -> tuple[Tensor, float]:
        """One call of every drawing: the loss, and the prediction's error relative to the teacher's variance."""
        with self._teacher.recording() as wanted:
            batch = self._trajectories.advance()
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
        """Where the drawings are."""
        return {_STATE + name: value for name, value in self._trajectories.state().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on drawing from there."""
        self._trajectories.restore({key.removeprefix(_STATE): value for key, value in tensors.items()
                                    if key.startswith(_STATE)})


class Observed:
    """A U-Net as a function, whose blocks' activity can be recorded.

    Args:
        network: with diffusers' block names.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._found: dict[str, Tensor] | None = None
        blocks = [(name, m) for name, m in network.named_modules()
                  if name.startswith(_FEATURES) and name.count(".") == (not name.startswith("mid"))]
        for name, block in blocks:
            block.register_forward_hook(self._hook(name))

    def __call__(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, S, D) -> (B, C, H, W)."""
        output: Tensor = self.network(sample, timestep, states, return_dict=False)[0]
        return output

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Collect the activity map of every block, by name, of the calls inside."""
        self._found = {}
        try:
            yield self._found
        finally:
            self._found = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._found is not None:
                self._found[name] = activity(output[0] if isinstance(output, tuple) else output)

        return keep


def activity(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W): mean square over the channels, divided by its mean over the picture."""
    maps = features.square().mean(1).flatten(1)
    return maps / maps.mean(1, keepdim=True).clamp(min=1e-6)

