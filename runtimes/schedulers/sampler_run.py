"""The base class of runs: timesteps, the noise levels behind them, and the order of the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.rounding import root

Levels = Sequence[tuple[float | np.float32, float | np.float32]]


class RunBase:
    """The base of runs; see `protocol.Run`.

    Every array of samples, noise or model output is (B, C, H, W) float32, noise of unit variance; timesteps are (n,)
    float32 or int64, one for each model call; noise levels are (n + 1,) float32, descending.
    """

    def __init__(self, timesteps: Timesteps, levels: Levels, first: int = 0, init_noise_sigma: float = 1.0) -> None:
        """Leave out the `first` of `timesteps`; `levels` are the factors of signal and noise at each of them.

        Raises:
            InputError: nothing is left.
        """
        if first >= len(timesteps):
            raise InputError("strength leaves no step of this schedule", where="strength", fix="raise it")
        self.timesteps = timesteps[first:]
        self.init_noise_sigma = init_noise_sigma
        self._levels = levels[first:]
        self._steps_taken = 0

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """`sample` itself: the methods in variance-preserving form feed the denoiser what they step."""
        return sample

    def needs_noise(self, i: int) -> bool:
        """False: the method is deterministic."""
        return False

    def add_noise(self, original: Float32, noise: Float32, i: int = 0) -> Float32:
        """`original` at the noise level of timestep i."""
        signal, level = self._levels[i]
        return signal * original + level * noise

    def estimate(self, sample: Float32, i: int) -> Float32:
        """The clean sample to expect from `sample` at the noise level of timestep i; see `protocol.Run`."""
        if i == len(self._levels):
            return sample
        signal, level = (float(number) for number in self._levels[i])
        return (signal / (signal**2 + level**2)) * sample

    def _in_order(self, i: int) -> None:
        """Methods with a memory are wrong when a step is skipped or repeated."""
        if i != self._steps_taken:
            raise ValueError(f"step {i} taken after {self._steps_taken} steps: start a new run to begin again")
        self._steps_taken += 1


def levels_of(alpha_cumprod: float | np.float32) -> tuple[np.float32, np.float32]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 for a share of signal variance, rounded as diffusers does."""
    signal = np.float32(alpha_cumprod)
    return root(signal), root(np.float32(1) - signal)


def required(noise: Float32 | None) -> Float32:
    """`noise`, (B, C, H, W) float32, standard normal, which a step that `needs_noise` cannot do without."""
    if noise is None:
        raise ValueError("this step needs standard-normal noise: see Run.needs_noise")
    return noise
