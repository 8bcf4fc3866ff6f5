"""What all methods share: reading a scheduler_config.json, checking a run's arguments, and the frame of a run."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers import sigmas
from runtimes.schedulers.protocol import Timesteps
from runtimes.schedulers.sigmas import Float32

WHERE = "scheduler_config.json"
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
)
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of diffusers' scheduler configs that nearly every class has, with the defaults that most give them.

    A method is a frozen subclass whose fields are the keys it reads, with its diffusers class's own defaults.
    """

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction", "sample")
    # Keys that change the result and are not implemented, each with the one value that is accepted.
    unsupported: ClassVar[Mapping[str, object]] = MappingProxyType({})
    # The values that each key of a closed set may have.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    # Keys that the method's diffusers class does not have and that are therefore not carried over.
    foreign: ClassVar[frozenset[str]] = frozenset()

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any]) -> S:
        """Read the keys of this method from a config of any class; other classes' keys are theirs, and ignored."""
        for key, accepted in cls.unsupported.items():
            if config.get(key) is not None and config[key] != accepted:
                raise InputError(
                    f"{key} = {config[key]!r} is not supported with this method",
                    where=WHERE,
                    fix=f"set {key} to {accepted!r} or choose another scheduler",
                )
        known = {f.name: f.default for f in fields(cls) if f.name not in cls.foreign}
        return cls(**{key: _typed(key, config[key], default) for key, default in known.items() if key in config})

    def __post_init__(self) -> None:
        """Refuse unknown values."""
        for key, allowed in {**CHOICES, **self.choices, "prediction_type": self.predictions}.items():
            value = getattr(self, key, allowed[0])
            if value not in allowed:
                raise InputError(f"{key} = {value!r} is unknown to this method", where=WHERE, fix=_one_of(allowed))
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise InputError(
                f"num_train_timesteps {self.num_train_timesteps} or steps_offset {self.steps_offset} is out of range",
                where=WHERE,
                fix="num_train_timesteps must be positive, steps_offset not negative",
            )
        _ = self.alphas_cumprod  # a broken noise schedule is refused here, not at the first run

    @cached_property
    def alphas_cumprod(self) -> Float32:
        """Share of signal variance left at each training step: (num_train_timesteps,) float32, read-only."""
        betas = sigmas.make_betas(
            self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.trained_betas
        )
        table = sigmas.cumulative_alphas(sigmas.rescale_zero_terminal_snr(betas) if self._zero_snr else betas)
        table.setflags(write=False)
        return table

    @cached_property
    def training_sigmas(self) -> Float32:
        """Noise-to-signal ratio of each training step, ascending: (num_train_timesteps,) float32, read-only."""
        table = sigmas.training_sigmas(self.alphas_cumprod, self._zero_snr)
        table.setflags(write=False)
        return table

    @property
    def _zero_snr(self) -> bool:
        return self.rescale_betas_zero_snr and self.num_train_timesteps > 1

    def check_start(self, steps: int, strength: float, eta: float = 0.0) -> int:
        """Validate a run's arguments; return how many steps at the head of the schedule `strength` leaves out."""
        try:
            whole = operator.index(steps)
        except TypeError:
            whole = 0
        if not 1 <= whole <= self.num_train_timesteps:
            raise InputError(
                f"{steps!r} steps, which must be a whole number from 1 to {self.num_train_timesteps}",
                where="steps",
                fix="25 is a good start",
            )
        if not 0 < strength <= 1:
            raise InputError(f"strength {strength!r} is not above 0 and at most 1", where="strength", fix="try 0.6")
        if eta != 0:
            raise InputError("only the ddim scheduler knows eta", where="eta", fix="leave it 0 or choose ddim")
        kept = min(int(steps * strength), steps)
        if kept < 1:
            raise InputError(
                f"strength {strength} leaves none of {steps} steps",
                where="strength",
                fix=f"use more steps or a strength of at least {math.ceil(100 / steps) / 100}",
            )
        return steps - kept

    def whole_timesteps(self, steps: int) -> Timesteps:
        """`sigmas.spaced_timesteps` rounded to indices of the training schedule: (steps,) int64."""
        spaced = sigmas.spaced_timesteps(self.timestep_spacing, steps, self.num_train_timesteps, self.steps_offset)
        timesteps = spaced.round().astype(np.int64)
        self.check_indices(timesteps)
        return timesteps

    def check_indices(self, timesteps: Timesteps) -> None:
        """Refuse a steps_offset that pushes the schedule past its end, and noise prediction where no signal is."""
        if timesteps[0] >= self.num_train_timesteps:
            raise InputError(
                f"{len(timesteps)} steps with steps_offset {self.steps_offset} start after the last training timestep",
                where="steps",
                fix="take fewer steps",
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[int(timesteps[0])] == 0:
            raise InputError(
                "a model that predicts the noise says nothing at the zero signal-to-noise of the first timestep",
                where=WHERE,
                fix="set rescale_betas_zero_snr to false or timestep_spacing to leading",
            )

    def levels(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) with alpha^2 + sigma^2 = 1 at a whole training timestep."""
        return levels_of(float(self.alphas_cumprod[timestep]))


class RunBase:
    """The frame of a run; see `protocol.Run`."""

    def __init__(
        self, timesteps: Timesteps, levels: Sequence[tuple[float, float]], init_noise_sigma: float = 1.0
    ) -> None:
        """`levels` are the factors of signal and noise at each of `timesteps`."""
        self.timesteps = timesteps
        self.init_noise_sigma = init_noise_sigma
        self._levels = levels
        self._steps_taken = 0

    def scale_model_input(self, sample: Float32, i: int) -> Float32:
        """`sample` itself: the methods in variance-preserving form feed the U-Net what they step."""
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
        signal, level = self._levels[i]
        return (signal / (signal**2 + level**2)) * sample

    def _in_order(self, i: int) -> None:
        """Multistep methods are wrong when a step is skipped or repeated."""
        if i != self._steps_taken:
            raise ValueError(f"step {i} taken after {self._steps_taken} steps: start a new run to begin again")
        self._steps_taken += 1


def levels_of(alpha_cumprod: float) -> tuple[float, float]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 for a share of signal variance, rounded as diffusers does."""
    signal = np.float32(alpha_cumprod)
    return float(sigmas.root(signal)), float(sigmas.root(1 - signal))


def required(noise: Float32 | None) -> Float32:
    """`noise`, which a step that `needs_noise` cannot do without."""
    if noise is None:
        raise ValueError("this step needs standard-normal noise: see Run.needs_noise")
    return noise


def _one_of(allowed: tuple[str, ...]) -> str:
    return "one of " + ", ".join(allowed)


def _typed(key: str, value: Any, default: Any) -> Any:
    """A config value as the type of its default; numbers are finite or the infinities that JSON's dialects allow."""
    if value is None and (default is None or default is False):
        return default
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, str):
        good = isinstance(value, str)
    elif isinstance(default, tuple) or key == "trained_betas":
        numbers = np.asarray(value, dtype=object).ravel().tolist()
        good = all(isinstance(number, int | float) for number in numbers)
        value = tuple(numbers)
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not good:
        expected = "a number" if default is None or isinstance(default, float) else f"like {default!r}"
        raise InputError(f"{key} = {value!r} is not {expected}", where=WHERE, fix="correct the file")
    return value
