"""The settings that all methods share: reads a scheduler_config.json and checks a run's arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32, Float64
from runtimes.schedulers.prediction import EPSILON, SAMPLE, V_PREDICTION
from runtimes.schedulers.protocol import Run
from runtimes.schedulers.sampler_run import levels_of

WHERE = "scheduler_config.json"
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
)
# Flow matching: other noise, other timesteps, other predictions than the methods here know.
FLOW: Mapping[str, tuple[object, ...]] = MappingProxyType({"use_flow_sigmas": (False,)})
FLOW_INERT = frozenset({"flow_shift", "time_shift_type"})
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of diffusers' scheduler configs that nearly every class has, with the defaults that most give them.

    A method is a frozen subclass whose fields are the keys it reads, with its diffusers class's own defaults.
    """

    predictions: ClassVar[tuple[str, ...]] = (EPSILON, V_PREDICTION, SAMPLE)
    # Keys that change the result and are not implemented, each with the values that are accepted, the usual one first.
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({})
    # Keys of the method's diffusers class that change nothing here, whatever they say.
    inert: ClassVar[frozenset[str]] = frozenset()
    # The values that each key of a closed set may have.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    # Keys that the method's diffusers class does not have and that are therefore not carried over.
    foreign: ClassVar[frozenset[str]] = frozenset()
    # Model calls of a step, all but the last one: diffusers' `Scheduler.order`.
    order: ClassVar[int] = 1
    # Whether the method can do without `eta`, or takes the share of fresh noise from it.
    reads_eta: ClassVar[bool] = False

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
        """Read the keys of this method from a config of any class; other classes' keys are theirs, and ignored.

        Raises:
            InputError: a key that the method's diffusers class reads has a value that is not implemented or makes no
                sense.
        """
        for key, accepted in cls.unsupported.items():
            if config.get(key) is not None and config[key] not in accepted:
                raise InputError(
                    f"{key} = {config[key]!r} is not supported with this method",
                    where=WHERE,
                    fix=f"set {key} to {accepted[0]!r} or choose another scheduler",
                )
        known = {f.name: f.default for f in fields(cls) if f.name not in cls.foreign}
        return cls(**{key: _typed(key, config[key], default) for key, default in known.items() if key in config})

    def __post_init__(self) -> None:
        """Refuse unknown values."""
        for key, allowed in {**CHOICES, **self.choices, "prediction_type": self.predictions}.items():
            value = getattr(self, key, allowed[0])
            if value not in allowed and not (key == "beta_schedule" and self.trained_betas is not None):
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
        betas = noise_levels.make_betas(
            self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.trained_betas
        )
        if self._zero_snr:
            betas = noise_levels.rescale_zero_terminal_snr(betas)
        table = noise_levels.cumulative_alphas(betas)
        table.setflags(write=False)
        return table

    @cached_property
    def training_sigmas(self) -> Float32:
        """Noise level (noise-to-signal ratio) of each training step: (num_train_timesteps,) float32, read-only."""
        table = noise_levels.training_sigmas(self.alphas_cumprod, self._zero_snr)
        table.setflags(write=False)
        return table

    @property
    def _zero_snr(self) -> bool:
        return self.rescale_betas_zero_snr and self.num_train_timesteps > 1

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0, *, skip: int | None = None) -> Run:
        """Begin a run; see `protocol.Scheduler.start`."""
        first = self.check_start(steps, strength, eta)
        return self._run(operator.index(steps), first * self.order if skip is None else skip, eta)

    def _run(self, steps: int, first: int, eta: float) -> Run:
        """A run of `steps` steps without its first timesteps."""
        raise NotImplementedError

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
        if eta != 0 and not self.reads_eta:
            raise InputError("only the schedulers ddim and tcd know eta", where="eta", fix="leave it 0 or choose ddim")
        if not 0 <= eta <= 1:
            raise InputError(f"eta {eta!r} is not between 0 and 1", where="eta", fix="0 is deterministic, 1 is DDPM")
        run = min(int(whole * strength), whole)
        if run < 1:
            raise InputError(
                f"strength {strength} leaves none of {steps} steps",
                where="strength",
                fix=f"use more steps or a strength of at least {math.ceil(100 / whole) / 100}",
            )
        return whole - run

    def whole_timesteps(self, steps: int) -> npt.NDArray[np.int64]:
        """`noise_levels.spaced_timesteps` rounded to indices of the training schedule: (steps,) int64."""
        spaced = noise_levels.spaced_timesteps(self.timestep_spacing, steps, self.num_train_timesteps,
                                               self.steps_offset)
        return spaced.round().astype(np.int64)

    def check_indices(self, timesteps: npt.NDArray[np.int64], *, clips: bool = False) -> None:
        """Refuse timesteps outside the training schedule, and noise prediction where there is no signal.

        Args:
            timesteps: (n,) int64, all that a run looks up.
            clips: the method clips x_0, and so stays finite without a signal.
        """
        if timesteps.max() >= self.num_train_timesteps:
            raise InputError(
                f"timestep {timesteps.max()}, after the last one of the training schedule, "
                f"{self.num_train_timesteps - 1}",
                where="steps",
                fix="take fewer steps, or set steps_offset to 0 in scheduler_config.json",
            )
        if timesteps.min() < 0:  # diffusers takes the noisiest training step for it, the last of its table
            raise InputError(
                "so many steps of trailing spacing end at timestep -1, for want of precision",
                where="steps",
                fix="take one step more or one less",
            )
        if self.prediction_type == EPSILON and not clips and np.any(self.alphas_cumprod[timesteps] == 0):
            raise InputError(
                "a model that predicts the noise says nothing at the zero signal-to-noise of the first timestep",
                where=WHERE,
                fix="set rescale_betas_zero_snr to false or timestep_spacing to leading",
            )

    def visited(
        self, timesteps: npt.NDArray[np.int64], first: int, *, clips: bool = False
    ) -> tuple[npt.NDArray[np.int64], list[tuple[np.float32, np.float32]]]:
        """`timesteps`, (n,) int64, without the `first`, checked, and (alpha, sigma) at each; see `check_indices`."""
        left = timesteps[first:]
        if len(left):
            self.check_indices(left, clips=clips)
        return left, [self.levels(int(t)) for t in left]

    def levels(self, timestep: int) -> tuple[np.float32, np.float32]:
        """(alpha, sigma) with alpha^2 + sigma^2 = 1 at a whole training timestep."""
        return levels_of(self.alphas_cumprod[timestep])


@dataclass(frozen=True, kw_only=True)
class SpreadSettings(Settings):
    """Keys of the classes whose noise levels may be chosen by formula, whatever the timesteps say."""

    # Whether Karras' formula heeds sigma_min and sigma_max; the others always do.
    karras_limits: ClassVar[bool] = True

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    # Read even by diffusers classes that do not list them: `hasattr(self.config, "sigma_min")`.
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        """Refuse two formulas at once, as diffusers does."""
        super().__post_init__()
        if self.use_karras_sigmas + self.use_exponential_sigmas + self.use_beta_sigmas > 1:
            raise InputError(
                "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas can be true",
                where=WHERE,
                fix="set the others to false",
            )

    @property
    def spreads(self) -> bool:
        """Whether noise levels are chosen by formula."""
        return self.use_karras_sigmas or self.use_exponential_sigmas or self.use_beta_sigmas

    def spread(self, levels: Float64 | Float32, steps: int) -> Float64:
        """Noise levels by the chosen formula, from the first to the last of `levels`, (n,): (steps,) float64."""
        limited = not self.use_karras_sigmas or self.karras_limits
        high = float(levels[0]) if self.sigma_max is None or not limited else self.sigma_max
        low = float(levels[-1]) if self.sigma_min is None or not limited else self.sigma_min
        if self.use_exponential_sigmas and min(low, high) <= 0:
            raise InputError("sigma_min and sigma_max must be positive", where=WHERE, fix="correct them")
        if self.use_karras_sigmas:
            return noise_levels.karras_sigmas(high, low, steps)
        spread = noise_levels.exponential_sigmas if self.use_exponential_sigmas else noise_levels.beta_sigmas
        return spread(high, low, steps)


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings(Settings):
    """Keys of the classes that can limit the clean sample; `prediction.limited` reads them."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a ratio outside 0 to 1."""
        super().__post_init__()
        if self.thresholding and not 0 <= self.dynamic_thresholding_ratio <= 1:
            raise InputError(
                f"dynamic_thresholding_ratio = {self.dynamic_thresholding_ratio} is not between 0 and 1",
                where=WHERE,
                fix="0.995 is usual",
            )


def not_finite(steps: int, i: int) -> InputError:
    """The error for a run whose step i has coefficients that are not finite; diffusers' result is then NaN."""
    return InputError(
        f"step {i + 1} of {steps} is not finite: the schedule repeats a noise level, or ends at zero noise in a form "
        "of the solver that divides by it",
        where="steps",
        fix="take fewer steps, or set lower_order_final to true or final_sigmas_type to sigma_min in "
        "scheduler_config.json",
    )


def _one_of(allowed: tuple[str, ...]) -> str:
    return "one of " + ", ".join(allowed)


def _typed(key: str, value: Any, default: Any) -> Any:
    """A config value as the type of its default; numbers are finite or the infinities that JSON's dialects allow.

    null is false where true or false is expected, as it is to diffusers.
    """
    if value is None and (default is None or isinstance(default, bool)):
        return default and False
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, str):
        good = isinstance(value, str)
    elif isinstance(default, tuple) or key == "trained_betas":
        good = isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)
        value = tuple(value) if good else value
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not good:
        expected = "a number" if default is None or isinstance(default, float) else f"like {default!r}"
        raise InputError(f"{key} = {value!r} is not {expected}", where=WHERE, fix="correct the file")
    return value
