"""Scheduler configs: the class that model_index.json names against the config's own, every key that diffusers reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any

from tests.fuzz.choices import Choices

# The classes that published Stable Diffusion and XL folders name. Of those that need scipy, which diffusers does not
# require, LMS is met as an invalid input; DPM++ SDE is not, which needs torchsde.
CLASSES = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
           "DPMSolverMultistepScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
           "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
           "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler", "EDMEulerScheduler",
           "EDMDPMSolverMultistepScheduler")

# What a published config says, whatever the class.
USUAL: Mapping[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                            "num_train_timesteps": 1000, "steps_offset": 1}
# Keys of one class that every published config of it has, without which its default would make flat images.
OWN: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "DDPMScheduler": {"clip_sample": False},
}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "num_train_timesteps": 1000}

TRAINED_BETAS = "0.0005 to 0.0105"  # in a case; the file has the numbers

_SWITCHES = ("set_alpha_to_one", "clip_sample", "thresholding", "rescale_betas_zero_snr", "use_karras_sigmas",
             "use_exponential_sigmas", "lower_order_final", "euler_at_final", "use_lu_lambdas",
             "use_flow_sigmas", "predict_x0", "skip_prk_steps", "use_dynamic_shifting")
VALUES: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(_SWITCHES, (False, True)),
    "num_train_timesteps": (1000, 500),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "beta_start": (0.00085, 0.0001), "beta_end": (0.012, 0.02),
    "trained_betas": (None, TRAINED_BETAS),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (1, 0, 2),
    "clip_sample_range": (1.0, 2.5),
    "dynamic_thresholding_ratio": (0.995, 0.7), "sample_max_value": (1.0, 1.5),
    "variance_type": ("fixed_small", "fixed_large", "fixed_small_log"),  # of DDPM; DPM++ has none or a learned one
    "interpolation_type": ("linear", "log_linear"),
    "sigma_min": (None, 0.05), "sigma_max": (None, 10.0),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (2, 1, 3),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "lambda_min_clipped": (-math.inf, -5.1),
    "disable_corrector": ([], [0], [0, 1]),
    "original_inference_steps": (50, 20), "timestep_scaling": (10.0, 5.0),
    "flow_shift": (1.0, 3.0), "time_shift_type": ("exponential", "linear"),
    "sigma_data": (0.5, 1.0), "sigma_schedule": ("karras", "exponential"), "rho": (7.0, 5.0),
}
_OTHERS = {"skip_prk_steps": True, "clip_sample": True, "solver_order": 3, "use_karras_sigmas": True}



@cache
def keys_of(class_name: str) -> tuple[str, ...]:
    """Every key that the class reads."""
    import diffusers

    found = signature(getattr(diffusers, class_name).__init__).parameters
    return tuple(key for key in found if key in VALUES and (key != "variance_type" or class_name == "DDPMScheduler"))


@cache
def changes() -> tuple[tuple[str, Any], ...]:
    """Every key with every value but its usual one."""
    return tuple((key, value) for key, values in VALUES.items() for value in values[1:])


def choose(choices: Choices) -> tuple[str, dict[str, Any]]:
    """The class in model_index.json, and the config: of one change at least, in a class that reads the key."""
    if choices.invalid == "scipy":
        named = choices.pick("scheduler.of scipy", ("LMSDiscreteScheduler", "EulerDiscreteScheduler"), counted=False)
        return named, {"_class_name": named, **USUAL, "use_beta_sigmas": named == "EulerDiscreteScheduler"}
    change = choices.pick("scheduler.change", (None, *changes()), often=8)
    able = tuple(name for name in CLASSES if change is None or change[0] in keys_of(name))
    own = named = choices.pick(f"scheduler.class for {change and change[0]}", able, counted=False)
    if choices.flag("scheduler.another class in model_index.json", often=2):
        named = choices.pick("scheduler.class in model_index.json", CLASSES)
    choices.met.append(("scheduler.class", named))
    made = _config(choices, own, change)
    if choices.invalid == "no scheduler class":
        del made["_class_name"]
    return named, made


def _config(choices: Choices, class_name: str, change: tuple[str, Any] | None) -> dict[str, Any]:
    """A config of the class with some of its keys changed, absent, or another class's."""
    usual = EDM if class_name.startswith("EDM") else USUAL
    made: dict[str, Any] = {"_class_name": class_name, **usual, **OWN.get(class_name, {})}
    choice = choices.pick("scheduler.keys", ("usual", "few", "of another class"), often=4)
    if choice == "few":
        made = {key: made[key] for key in ("_class_name", "beta_schedule", "beta_start", "beta_end") if key in made}
    elif choice == "of another class":
        key = choices.pick("scheduler.key of another class", tuple(_OTHERS))
        made[key] = made.get(key, _OTHERS[key])
    more = [key for key in keys_of(class_name) if change is None or key != change[0]]
    for _ in range(choices.pick("scheduler.further changes", (0, 1, 2), often=2)):
        key = choices.pick(f"scheduler.further key of {class_name}", more, counted=False)
        made[key] = choices.pick(f"scheduler.{key}", VALUES[key], counted=False)
    if change is not None:
        made[change[0]] = change[1]
    version = choices.pick("scheduler._diffusers_version", ("0.42.1", "0.6.0", "0.18.2", None), often=1)
    return made if version is None else {**made, "_diffusers_version": version}
