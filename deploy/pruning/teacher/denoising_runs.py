"""Runs the teacher's own trajectories, which pruning is judged on and recovery learns from: prompts suffice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtimes.errors import InputError
from runtimes.schedulers.noise_levels import cumulative_alphas, make_betas, rescale_zero_terminal_snr
from runtimes.schedulers.prediction import EPSILON, SAMPLE, V_PREDICTION

STEPS = (15, 30)  # the number of a trajectory's steps is sampled from here, so that no timestep is left out


@dataclass(frozen=True)
class Diffusion:
    """Noise schedule and meaning of the network's output.

    Every array of samples, noise or predictions is (B, C, H, W) float32, latents or standard-normal noise; timesteps
    are (B,) int64.

    Attributes:
        alphas: (T,) float32, cumulative products, signal variance at each timestep.
        prediction: "epsilon", "v_prediction" or "sample".
    """

    alphas: Tensor
    prediction: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Diffusion:
        """From scheduler_config.json, with diffusers' defaults.

        Raises:
            InputError: an unknown kind of prediction.
        """
        prediction = config.get("prediction_type", EPSILON)
        if prediction not in (EPSILON, V_PREDICTION, SAMPLE):
            raise InputError(f"prediction_type {prediction!r} is unknown", where="scheduler_config.json")
        betas = make_betas(config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000),
                           config.get("beta_start", 0.0001), config.get("beta_end", 0.02), config.get("trained_betas"))
        if config.get("rescale_betas_zero_snr"):
            betas = rescale_zero_terminal_snr(betas)
        return cls(torch.from_numpy(np.asarray(cumulative_alphas(betas), np.float32)), prediction)

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) int64 -> signal and noise level, each (B, 1, 1, 1); before the first timestep the sample is clean."""
        alphas = self.alphas.to(timestep.device)[timestep.clamp(min=0)]
        alphas = torch.where(timestep < 0, torch.ones_like(alphas), alphas)[:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def noised(self, original: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of clean samples at the noise levels of their timesteps."""
        alpha, sigma = self.levels(timestep)
        return alpha * original + sigma * noise

    def target(self, original: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The output of a perfect network."""
        alpha, sigma = self.levels(timestep)
        return {EPSILON: noise, SAMPLE: original, V_PREDICTION: alpha * noise - sigma * original}[self.prediction]

    def step(self, output: Tensor, timestep: Tensor, after: Tensor, sample: Tensor) -> Tensor:
        """Deterministic DDIM (arXiv:2010.02502, eq. 12) from `timestep` to `after`, both (B,) int64."""
        alpha, sigma = self.levels(timestep)
        if self.prediction == V_PREDICTION:
            original, noise = alpha * sample - sigma * output, alpha * output + sigma * sample
        elif self.prediction == EPSILON:
            original, noise = (sample - sigma * output) / alpha, output
        else:
            original, noise = output, (sample - alpha * output) / sigma
        alpha, sigma = self.levels(after)
        return alpha * original + sigma * noise


@dataclass(frozen=True)
class Batch:
    """Calls that the sampler makes of the network: first those with prompts, then the same without.

    Attributes:
        sample: (2B, C, H, W) float32. timestep: (2B,) int64. states: (2B, S, D) float32 text embeddings.
        output: (2B, C, H, W) float32, the teacher's answer. prompts: (B,) int64, which prompt each trajectory has.
    """

    sample: Tensor
    timestep: Tensor
    states: Tensor
    output: Tensor
    prompts: Tensor


class Trajectories:
    """Images that the teacher is generating with classifier-free guidance, each at a point of its own.

    A trajectory that is finished makes room for the next prompt; all randomness comes from (seed, number of
    the trajectory), so a stream that goes on from its `state` is the stream that was never interrupted.

    Args:
        teacher: (sample, timestep, states) -> (B, C, H, W).
        diffusion: how to get from one step to the next.
        prompts: (N, S, D) float32 text embeddings, used in random order. empty: (S, D) of no prompt.
        shape: (C, H, W) of the latents.
        guidance_scale: the usual one of the model.
        size: trajectories at a time: a batch holds two calls of each.
        seed: of everything.

    Attributes:
        size: the same. device: where everything is.
    """

    def __init__(self, teacher: Any, diffusion: Diffusion, prompts: Tensor, empty: Tensor, shape: tuple[int, ...],
                 guidance_scale: float, size: int, seed: int = 0) -> None:
        self._teacher, self._diffusion, self._prompts, self._empty = teacher, diffusion, prompts, empty
        self._shape, self._guidance, self._seed = shape, guidance_scale, seed
        self.size, self.device = size, prompts.device
        self._last = len(diffusion.alphas) - 1
        self._started = 0
        self._latents = torch.empty(size, *shape, device=self.device)
        # prompt, steps, shift of the timesteps, steps done
        self._plans = torch.zeros(size, 4, dtype=torch.int64)
        self.finished: list[Tensor] = []
        for row in range(size):
            self._begin(row)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end; each one moves every trajectory one step on."""
        while True:
            yield self.advance()

    @torch.no_grad()
    def advance(self) -> Batch:
        """Ask the teacher once for every trajectory; latents that end with it go to `finished`, (C, H, W) each."""
        device = self.device
        now, after = (self._timesteps(offset).to(device) for offset in (0, 1))
        prompts = self._plans[:, 0].to(device)
        states = self.states(prompts)
        sample, timestep = self._latents.repeat(2, 1, 1, 1), now.repeat(2)
        output = self._teacher(sample, timestep, states)
        asked, unasked = output.chunk(2)
        guided = unasked + self._guidance * (asked - unasked)
        self._latents = self._diffusion.step(guided, now, after, self._latents)
        self._plans[:, 3] += 1
        for row in (self._plans[:, 3] == self._plans[:, 1]).nonzero().flatten().tolist():
            self.finished.append(self._latents[row].clone())
            self._begin(row)
        return Batch(sample, timestep, states, output, prompts)

    def states(self, prompts: Tensor) -> Tensor:
        """Indices of prompts, (B,) int64 -> embeddings (2B, S, D) float32: theirs, then as many of no prompt."""
        return torch.cat([self._prompts[prompts], self._empty.expand(len(prompts), -1, -1)])

    def generate(self, count: int) -> Tensor:
        """The latents of the next `count` finished images, (count, C, H, W) float32."""
        while len(self.finished) < count:
            self.advance()
        generated, self.finished = self.finished[:count], self.finished[count:]
        return torch.stack(generated)

    def state(self) -> dict[str, Tensor]:
        """What the stream resumes from: latents (size, C, H, W) float32, plans (size, 4) int64, a counter () int64."""
        return {"latents": self._latents, "plans": self._plans, "drawn": torch.tensor(self._started)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state`, whose latents and plans have the shapes and dtypes given there."""
        self._latents = state["latents"].to(self.device)
        self._plans, self._started = state["plans"].clone(), int(state["drawn"])

    def _begin(self, row: int) -> None:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._started)
        steps = int(torch.randint(*STEPS, (), generator=generator))
        half = math.ceil(self._last / steps / 2)
        self._plans[row] = torch.tensor([
            int(torch.randint(len(self._prompts), (), generator=generator)), steps,
            int(torch.randint(-half, half, (), generator=generator)), 0])
        self._latents[row] = torch.randn(self._shape, generator=generator).to(self._latents.device)
        self._started += 1

    def _timesteps(self, offset: int) -> Tensor:
        """(size,) int64: evenly spaced from the last down, all but the first shifted; -1 is the clean image."""
        _, steps, shift, done = self._plans.T
        done = done + offset
        spaced = torch.round((self._last + 1) * (steps - done) / steps).long() - 1
        inner = (spaced + shift).clamp(1, self._last)
        return torch.where(done == 0, spaced, torch.where(done >= steps, -1, inner))
