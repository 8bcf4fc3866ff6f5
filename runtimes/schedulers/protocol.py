"""The two protocols of sampling: `Scheduler`, an immutable description, and `Run`, the state of one denoising run."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.schedulers.noise_levels import Float32

Timesteps: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.int64]


class Run(Protocol):
    """One denoising run. Not shareable: multistep methods remember earlier model outputs.

    The steps are taken in the order i = 0, 1, ..., len(timesteps) - 1:

        sample = noise * run.init_noise_sigma            # or run.add_noise(original, noise), image to image
        for i, t in enumerate(run.timesteps):
            output = denoiser(run.scale_model_input(sample, i), t)
            sample = run.step(output, i, sample, standard_normal() if run.needs_noise(i) else None)

    Every array of samples, noise or model output is (B, C, H, W) float32, noise of unit variance. A batch shares a run.
    """

    @property
    def timesteps(self) -> Timesteps:
        """The timestep of each model call: (n,), float32 where the method follows noise levels, int64 where it
        follows the training schedule."""
        ...

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the sample that a run from pure noise starts with."""
        ...

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """The denoiser's input at step i, made from `sample`."""
        ...

    def needs_noise(self, i: int) -> bool:
        """Whether step i adds fresh noise."""
        ...

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """The sample after step i. `noise` is standard normal, sampled by the caller, where `needs_noise(i)`."""
        ...

    def add_noise(self, original: Float32, noise: Float32, i: int = 0) -> Float32:
        """`original` diffused to the noise level of the run's timestep i; `noise` is standard normal."""
        ...

    def estimate(self, sample: Float32, i: int) -> Float32:
        """The clean sample to expect from `sample` at the noise level of timestep i (n: after the last step).

        Wiener's estimate: latents of unit variance under x_t = alpha x_0 + sigma noise have the mean
        alpha / (alpha^2 + sigma^2) x_t. Good enough to look at; sampling does not use it.
        """
        ...


class Scheduler(Protocol):
    """A sampling method with its noise schedule: immutable, hashable, shareable between threads."""

    @property
    def num_train_timesteps(self) -> int:
        """Length of the training schedule: the most steps a run can have."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction or sample."""
        ...

    @property
    def order(self) -> int:
        """Model calls of a step, 1 or 2; the last step always takes one. PNDM counts as 1, as in diffusers."""
        ...

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0, *, skip: int | None = None) -> Run:
        """Begin a run.

        Args:
            steps: length of the whole schedule, 1 to num_train_timesteps.
            strength: share of the schedule that is run, in (0, 1]; below 1 for image to image, as
                StableDiffusionImg2ImgPipeline.get_timesteps cuts it.
            eta: DDIM's share of fresh noise, 0 (deterministic) to 1 (DDPM), or TCD's gamma; 0 for every other method.
            skip: timesteps left out at the head, in place of those that `strength` leaves out; a multiple of `order`.

        Raises:
            InputError: an argument is out of range, or the schedule of so many steps cannot be run.
        """
        ...
