"""PNDM: Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv 2202.09778.

With skip_prk_steps, as Stable Diffusion 1.x sets it, the linear multistep method alone (PLMS), which asks the model
twice about its second timestep; without, Runge-Kutta on the first three (twelve model calls), then PLMS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.prediction import EPSILON, V_PREDICTION, to_epsilon
from runtimes.schedulers.rounding import root
from runtimes.schedulers.sampler_run import RunBase, levels_of
from runtimes.schedulers.settings import Settings

RUNGE_KUTTA_CALLS = 12


@dataclass(frozen=True, kw_only=True)
class Pndm(Settings):
    """PNDM with the keys and defaults of diffusers' PNDMScheduler."""

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION)
    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})

    timestep_spacing: str = "leading"
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def _run(self, steps: int, first: int, eta: float) -> PndmRun:
        if not self.skip_prk_steps and steps < 4:
            raise InputError(
                f"{steps} steps, and Runge-Kutta needs 4 or more", where="steps", fix="set skip_prk_steps to true"
            )
        return PndmRun(self, self.calls(steps), first, self.num_train_timesteps // steps)

    def calls(self, steps: int) -> npt.NDArray[np.int64]:
        """The timestep of each model call: (n,) int64, n above `steps`."""
        timesteps = self.whole_timesteps(steps)
        if self.skip_prk_steps:
            return np.concatenate([timesteps[:1], timesteps[1:2], timesteps[1:]])
        half = self.num_train_timesteps // steps // 2
        # t, t - h/2, t - h/2, t - h for each of the first three steps of length h
        points = [(timesteps[k], timesteps[k + 1] + half, timesteps[k + 1] + half, timesteps[k + 1]) for k in range(3)]
        return np.concatenate([np.array(points, dtype=np.int64).ravel(), timesteps[3:]])


class PndmRun(RunBase):
    """One run of PNDM."""

    def __init__(self, scheduler: Pndm, calls: npt.NDArray[np.int64], first: int, stride: int) -> None:
        """Call the model at `calls` but the `first` of them; a step spans `stride` timesteps.

        Raises:
            InputError: a step would start outside the training schedule.
        """
        super().__init__(*scheduler.visited(calls, first))
        self._scheduler, self._stride = scheduler, stride
        # Image to image has fewer calls, and diffusers' Runge-Kutta steps start where those of the whole schedule do.
        self._starts = calls[: 0 if scheduler.skip_prk_steps else RUNGE_KUTTA_CALLS : 4]
        self._outputs: list[Float32] = []  # newest last, four at most
        self._sum: Float32 | None = None
        self._held: Float32 | None = None  # the sample that a step of several model calls started from
        again = self.timesteps[1:2] + stride if scheduler.skip_prk_steps else self._starts
        scheduler.check_indices(np.concatenate([calls[first:], again]))

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """One model call: a quarter of a Runge-Kutta step, or a step of the linear multistep method."""
        self._in_order(i)
        if i < 4 * len(self._starts):
            return self._runge_kutta(model_output, i, sample)
        return self._linear_multistep(model_output, i, sample)

    def _runge_kutta(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """Eq. 13 of the paper: weights 1/6, 1/3, 1/3, 1/6."""
        stage = i % 4
        weighted = (1 / 6 if stage in (0, 3) else 1 / 3) * model_output
        self._sum = weighted if stage == 0 or self._sum is None else self._sum + weighted
        if stage == 0 or self._held is None:
            self._held = sample
            self._outputs.append(model_output)
        slope = self._sum if stage == 3 else model_output
        target = int(self.timesteps[i]) - (0 if i % 2 else self._stride // 2)
        return self._transfer(self._held, int(self._starts[i // 4]), target, slope)

    def _linear_multistep(self, model_output: Float32, i: int, sample: Float32) -> Float32:
        """Eq. 12 of the paper, with lower orders while fewer than four outputs are known."""
        timestep = int(self.timesteps[i])
        if i == 1:  # the first step again, from the mean of the slopes at its two ends
            assert self._held is not None
            mean = 0.5 * (model_output + self._outputs[-1])
            return self._transfer(self._held, timestep + self._stride, timestep, mean)
        if i == 0:
            self._held = sample
        self._outputs = [*self._outputs[-3:], model_output]
        return self._transfer(sample, timestep, timestep - self._stride, adams_bashforth(self._outputs))

    def _transfer(self, sample: Float32, timestep: int, target: int, model_output: Float32) -> Float32:
        """Eq. 9 of the paper: x at `target` from x and the model's output at `timestep`.

        In float32 and diffusers' order, since the two terms cancel where `now` is small.
        """
        now, after, one = np.float32(self._scheduler.alphas_cumprod[timestep]), self._signal(target), np.float32(1)
        epsilon = to_epsilon(self._scheduler.prediction_type, model_output, sample, *levels_of(now))
        scale = now * root(one - after) + root(now * (one - now) * after)
        moved = np.asarray((after - now) * epsilon / scale, dtype=np.float32)
        return root(after / now) * sample - moved

    def _signal(self, timestep: int) -> np.float32:
        if timestep < 0 and self._scheduler.set_alpha_to_one:
            return np.float32(1)
        return np.float32(self._scheduler.alphas_cumprod[max(timestep, 0)])


def adams_bashforth(outputs: list[Float32]) -> Float32:
    """Extrapolated slope from one to four model outputs, (B, C, H, W) float32 each, newest last."""
    newest = outputs[::-1]
    if len(newest) == 1:
        return newest[0]
    if len(newest) == 2:
        return 0.5 * (3 * newest[0] - newest[1])
    if len(newest) == 3:
        return (1 / 12) * (23 * newest[0] - 16 * newest[1] + 5 * newest[2])
    return (1 / 24) * (55 * newest[0] - 59 * newest[1] + 37 * newest[2] - 9 * newest[3])
