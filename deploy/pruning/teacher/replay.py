"""Remembers the sampler's calls, which a student learns from in mixed order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deploy.pruning.teacher.block_activity import Observed
from deploy.pruning.teacher.denoising_runs import Batch, Trajectories

_MAPS, _TRAJECTORIES, _MEMORY = "maps.", "trajectories.", "memory."


class Replay:
    """The last calls of the teacher's samples, sampled from at random (experience replay, Lin 1992, Mach. Learn. 8).

    Successive calls show the same images at neighbouring timesteps: learned in that order, what one set of images
    taught is unlearned with the next. Of a call little is stored: latents, answers, activity maps, the number of its
    prompt.

    Every array of a batch is as `Batch` says; activity maps are (2B, H * W) float32 of mean 1, those with
    prompts first. A state holds the same features in pairs, (calls, 2, ...), and indices () int64.

    Args:
        teacher: the trajectories' teacher, which records what its blocks do.
        trajectories: whose calls are remembered.
        size: of the memory in calls of one trajectory, rounded up to whole calls of all trajectories.
        seed: of the order.
    """

    def __init__(self, teacher: Observed, trajectories: Trajectories, size: int, seed: int) -> None:
        self._teacher, self._trajectories, self._seed = teacher, trajectories, seed
        self._turns = -(-size // trajectories.size)
        self._asked = self._mixed = 0
        self._memory: dict[str, Tensor] = {}

    def mixed(self) -> tuple[Batch, dict[str, Tensor]]:
        """As many calls as there are trajectories, any of those remembered, and the activity maps of the teacher.

        Each time the trajectories advance by a step; before the first until the memory is full, so early batches are of
        all the schedule, too.
        """
        while self._asked < self._turns + self._mixed:
            self._remember()
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._mixed)
        self._mixed += 1
        trajectories = self._trajectories.size
        rows = torch.randperm(self._turns * trajectories, generator=generator)[:trajectories]
        found = {name: values[rows.to(values.device)] for name, values in self._memory.items()}
        batch = Batch(found["sample"].repeat(2, 1, 1, 1), found["timestep"].repeat(2),
                      self._trajectories.states(found["prompt"]), _stacked(found["output"]), found["prompt"])
        return batch, {name.removeprefix(_MAPS): _stacked(v) for name, v in found.items() if name.startswith(_MAPS)}

    def state(self) -> dict[str, Tensor]:
        """What the stream resumes from, by name."""
        counts = {"asked": torch.tensor(self._asked), "mixed": torch.tensor(self._mixed)}
        return (counts | {_TRAJECTORIES + name: value for name, value in self._trajectories.state().items()}
                | {_MEMORY + name: value for name, value in self._memory.items()})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state`."""
        self._asked, self._mixed = int(state["asked"]), int(state["mixed"])
        self._trajectories.restore(_below(_TRAJECTORIES, state))
        device = self._trajectories.device
        self._memory = {name: value.to(device) for name, value in _below(_MEMORY, state).items()}

    def _remember(self) -> None:
        with self._teacher.recording() as maps:
            batch = self._trajectories.advance()
        self._trajectories.finished.clear()
        trajectories = self._trajectories.size
        stored = {"sample": batch.sample[:trajectories], "timestep": batch.timestep[:trajectories],
                "prompt": batch.prompts,
                "output": _pairs(batch.output)} | {_MAPS + name: _pairs(values) for name, values in maps.items()}
        first = self._asked % self._turns * trajectories
        for name, values in stored.items():
            if name not in self._memory:
                self._memory[name] = values.new_empty(self._turns * trajectories, *values.shape[1:])
            self._memory[name][first : first + trajectories] = values
        self._asked += 1


def _pairs(values: Tensor) -> Tensor:
    """(2B, ...), first with prompts and then without -> (B, 2, ...)."""
    return torch.stack(values.chunk(2), 1)


def _stacked(pairs: Tensor) -> Tensor:
    """(B, 2, ...) -> (2B, ...), as the sampler calls."""
    return torch.cat(pairs.unbind(1))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
