"""The training loop of every recovery: optimizer, learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtimes.errors import ParityError

CHECKPOINT, SAVE_EVERY_SECONDS = "recovery.safetensors", 60.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a pruned network is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: warms up linearly, then falls linearly to zero (arXiv:2502.15938): what was not cut away knows
            nearly everything already, and a rate that stays high unlearns it.
        warmup: steps of it.
        accumulate: batches per optimizer step: their gradients are averaged.
        ema: decay of the averaged weights, which are the result.
        seed: of what is sampled to learn from.
    """

    steps: int
    learning_rate: float = 2e-4
    warmup: int = 100
    accumulate: int = 1
    ema: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of one step."""
        return self.learning_rate * min((step + 1) / self.warmup, 1.0) * (self.steps - step) / self.steps


class Task(Protocol):
    """What a network learns, and from what: a stream of losses that can be resumed.

    Attributes:
        network: the network that learns.
    """

    network: nn.Module

    def loss(self) -> tuple[Tensor, float]:
        """The loss of the next batch, a float32 scalar with a gradient, and the error that is reported."""

    def state(self) -> dict[str, Tensor]:
        """What the stream resumes from, by names of its own: indices and activations, of any shape and dtype."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from the `state` among a checkpoint's tensors: indices and activations, of any shape and dtype."""


class Training:
    """A network that is learning. Seeded and resumable: an interruption leaves no trace in the result.

    Args:
        task: what is learned.
        schedule: how long and how fast.
        folder: receives the checkpoint; training resumes from a checkpoint of the same schedule there.
        keep_zeros: weights that are zero now stay zero: a mask survives training.
    """

    def __init__(self, task: Task, schedule: Schedule, folder: Path, *, keep_zeros: bool = False) -> None:
        self.task, self.schedule, self.step = task, schedule, 0
        self._file = folder / CHECKPOINT
        self._parameters = dict(task.network.named_parameters())
        task.network.requires_grad_(True).train()
        self._masks = {n: p.detach() != 0 for n, p in self._parameters.items() if p.ndim > 1} if keep_zeros else {}
        self._averaged = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=schedule.learning_rate, betas=(0.9, 0.99),
                                            weight_decay=0.0)
        self._restore()

    def run(self, report: Callable[[int, float], None] = lambda step, loss: None) -> nn.Module:
        """Train to the last step.

        Args:
            report: called with the number of steps done and the task's error.

        Returns:
            the network with the averaged weights, in eval mode, without gradients.

        Raises:
            ParityError: the loss is not finite.
        """
        saved = time.monotonic()
        while self.step < self.schedule.steps:
            error = self._train_step()
            self.step += 1
            report(self.step, error)
            if not math.isfinite(error):
                raise ParityError("the loss is not finite", where=f"recovery, step {self.step}",
                                  fix="prune less: a smaller ratio, or other widths")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS or self.step == self.schedule.steps:
                self.save()
                saved = time.monotonic()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._averaged[name])
        return self.task.network.eval().requires_grad_(False)

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename."""
        tensors = {f"student.{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"averaged.{name}": value for name, value in self._averaged.items()}
        tensors |= self.task.state()
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial,
                  {"recipe": json.dumps(asdict(self.schedule)), "step": str(self.step)})
        partial.replace(self._file)

    def _restore(self) -> None:
        if not self._file.is_file():
            return
        with safe_open(self._file, framework="pt") as stored:
            header = stored.metadata()
            if json.loads(header["recipe"]) != asdict(self.schedule):
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
        self.task.restore(tensors)

    def _train_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        errors = []
        for _ in range(self.schedule.accumulate):
            loss, error = self.task.loss()
            (loss / self.schedule.accumulate).backward()
            errors.append(error)
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._parameters[name].mul_(mask)
            keep = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
            for name, parameter in self._parameters.items():
                self._averaged[name].lerp_(parameter, 1 - keep)
        return sum(errors) / len(errors)
