"""Recovery: a pruned U-Net learns from the one it was cut from, along the teacher's own trajectories. Resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.pruning.trajectory import Batch, Trajectories
from runtimes.errors import ParityError

CHECKPOINT, SAVE_EVERY_SECONDS = "recovery.safetensors", 60.0
_FEATURES = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Recipe:
    """How a pruned network is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: warms up linearly, stays, and falls to zero over the last steps (warm-up, stable, decay:
            arXiv:2404.06395, section 4): the error of a constant rate hardly moves, its decay is what brings it down.
        warmup: steps of it.
        decay: share of the steps over which the rate falls.
        accumulate: batches per optimizer step: their gradients are averaged.
        feature_weight: of the feature loss against the prediction loss.
        guided_weight: of the error of the guided prediction, which is what the sampler uses.
        ema: decay of the averaged weights, which are the result.
        seed: of the trajectories.
    """

    steps: int
    learning_rate: float = 5e-4
    warmup: int = 100
    decay: float = 0.3
    accumulate: int = 1
    feature_weight: float = 0.05
    guided_weight: float = 0.2
    ema: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * min((self.steps - step) / (self.decay * self.steps), 1.0)


class Recovery:
    """Distillation in progress.

    The loss: mean squared error of the prediction for both branches of classifier-free guidance and of the guided
    prediction, each in units of the teacher's variance (output distillation as in BK-SDM, arXiv:2305.15798, eq. 2),
    plus attention transfer between blocks (Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2): where in the picture
    each block is active must match, whatever number of channels it is active with.

    Args:
        student, teacher: networks with diffusers' block names, on the trajectories' device; the teacher is frozen.
        trajectories: of the teacher; made with `observed(teacher)` as its teacher.
        recipe: how long and how fast.
        guidance_scale: of the guided error.
        folder: receives the checkpoint; a checkpoint of the same recipe there is gone on from.
        keep_zeros: weights that are zero now stay zero: a mask survives training.
    """

    def __init__(self, student: nn.Module, teacher: Observed, trajectories: Trajectories, recipe: Recipe,
                 guidance_scale: float, folder: Path, *, keep_zeros: bool = False) -> None:
        self.recipe, self.step = recipe, 0
        self._student, self._observed = Observed(student), teacher
        self._trajectories, self._guidance, self._file = trajectories, guidance_scale, folder / CHECKPOINT
        self._parameters = dict(student.named_parameters())
        student.requires_grad_(True).train()
        self._masks = {n: p.detach() != 0 for n, p in self._parameters.items() if p.ndim > 1} if keep_zeros else {}
        self._averaged = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.99),
                                            weight_decay=0.0)
        self._restore()

    def run(self, report: Callable[[int, float], None] = lambda step, loss: None) -> nn.Module:
        """Train to the last step.

        Args:
            report: told the number of steps done and the prediction error, relative to the teacher's variance.

        Returns:
            the student with the averaged weights, in eval mode, without gradients.

        Raises:
            ParityError: the loss is not finite.
        """
        saved = time.monotonic()
        while self.step < self.recipe.steps:
            error = self._train_step()
            self.step += 1
            report(self.step, error)
            if not math.isfinite(error):
                raise ParityError("the loss is not finite", where=f"recovery, step {self.step}",
                                  fix="lower the learning rate")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
        student = self._student.network
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._averaged[name])
        return student.eval().requires_grad_(False)

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename."""
        tensors = {f"student.{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"averaged.{name}": value for name, value in self._averaged.items()}
        tensors |= {f"trajectories.{name}": value for name, value in self._trajectories.state().items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial,
                  {"recipe": json.dumps(asdict(self.recipe)), "step": str(self.step)})
        partial.replace(self._file)

    def _restore(self) -> None:
        if not self._file.is_file():
            return
        with safe_open(self._file, framework="pt") as stored:
            header = stored.metadata()
            if json.loads(header["recipe"]) != asdict(self.recipe):
                return
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        self.step = int(header["step"])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"student.{name}"])
                self._averaged[name].copy_(tensors[f"averaged.{name}"])
                # AdamW keeps its count of steps on the CPU.
                self._optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if (value := tensors.get(f"optimizer.{key}.{name}")) is not None}
        self._trajectories.restore(_below("trajectories.", tensors))

    def _train_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        errors = []
        for _ in range(self.recipe.accumulate):
            with self._observed.recording() as wanted:
                batch = self._trajectories.advance()
            loss, error = self._loss(batch, wanted)
            (loss / self.recipe.accumulate).backward()
            errors.append(error)
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._parameters[name].mul_(mask)
            keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            for name, parameter in self._parameters.items():
                self._averaged[name].lerp_(parameter, 1 - keep)
        return sum(errors) / len(errors)

    def _loss(self, batch: Batch, wanted: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        with self._student.recording() as found:
            output = self._student(batch.sample, batch.timestep, batch.states)
        scale = batch.output.var()
        prediction = F.mse_loss(output, batch.output) / scale
        asked, unasked = (output - batch.output).chunk(2)
        guided = (unasked + self._guidance * (asked - unasked)).square().mean() / scale
        features = torch.stack([(found[name] - wanted[name]).square().mean() for name in wanted if name in found]).sum()
        recipe = self.recipe
        loss = prediction + recipe.guided_weight * guided + recipe.feature_weight * features
        return loss, prediction.item()


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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
