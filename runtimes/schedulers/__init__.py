"""Samplers in numpy, equal to diffusers' step by step, with all randomness sampled by the caller.

`from_config` reads a diffusers scheduler_config.json into a `Scheduler`; `Scheduler.start` begins a `Run`.
One method a file; `noise_levels` has the noise schedules, `prediction` the meaning of a model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from runtimes.errors import InputError
from runtimes.schedulers.methods.ddim import Ddim
from runtimes.schedulers.methods.ddpm import Ddpm
from runtimes.schedulers.methods.deis import Deis
from runtimes.schedulers.methods.dpm_multistep import DpmSolverPP
from runtimes.schedulers.methods.dpm_sde import DpmSde
from runtimes.schedulers.methods.dpm_singlestep import DpmSolverSingle
from runtimes.schedulers.methods.edm_dpmpp import EdmDpmSolverPP
from runtimes.schedulers.methods.edm_euler import EdmEuler
from runtimes.schedulers.methods.euler import Euler
from runtimes.schedulers.methods.euler_ancestral import EulerAncestral
from runtimes.schedulers.methods.heun import Heun
from runtimes.schedulers.methods.kdpm2 import Kdpm2
from runtimes.schedulers.methods.kdpm2_ancestral import Kdpm2Ancestral
from runtimes.schedulers.methods.lcm import Lcm
from runtimes.schedulers.methods.lms import Lms
from runtimes.schedulers.methods.pndm import Pndm
from runtimes.schedulers.methods.sa_solver import SaSolver
from runtimes.schedulers.methods.tcd import Tcd
from runtimes.schedulers.methods.unipc import UniPc
from runtimes.schedulers.protocol import Run, Scheduler

__all__ = ["CLASS_NAMES", "DEFAULTED", "SCHEDULERS", "Run", "Scheduler", "from_config", "method_of"]

SCHEDULERS: Mapping[str, Callable[[Mapping[str, Any]], Scheduler]] = MappingProxyType(
    {
        "ddim": Ddim.from_config,
        "ddpm": Ddpm.from_config,
        "euler": Euler.from_config,
        "euler-ancestral": EulerAncestral.from_config,
        "heun": Heun.from_config,
        "kdpm2": Kdpm2.from_config,
        "kdpm2-ancestral": Kdpm2Ancestral.from_config,
        "lms": Lms.from_config,
        "dpm++": DpmSolverPP.from_config,
        "dpm-single": DpmSolverSingle.from_config,
        "dpm-sde": DpmSde.from_config,
        "deis": Deis.from_config,
        "unipc": UniPc.from_config,
        "sa-solver": SaSolver.from_config,
        "lcm": Lcm.from_config,
        "tcd": Tcd.from_config,
        "pndm": Pndm.from_config,
        "edm-euler": EdmEuler.from_config,
        "edm-dpm++": EdmDpmSolverPP.from_config,
    }
)

CLASS_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddpm",
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler-ancestral",
        "HeunDiscreteScheduler": "heun",
        "KDPM2DiscreteScheduler": "kdpm2",
        "KDPM2AncestralDiscreteScheduler": "kdpm2-ancestral",
        "LMSDiscreteScheduler": "lms",
        "DPMSolverMultistepScheduler": "dpm++",
        "DPMSolverSinglestepScheduler": "dpm-single",
        "DPMSolverSDEScheduler": "dpm-sde",
        "DEISMultistepScheduler": "deis",
        "UniPCMultistepScheduler": "unipc",
        "SASolverScheduler": "sa-solver",
        "LCMScheduler": "lcm",
        "TCDScheduler": "tcd",
        "PNDMScheduler": "pndm",
        "EDMEulerScheduler": "edm-euler",
        "EDMDPMSolverMultistepScheduler": "edm-dpm++",
    }
)

# diffusers' record of keys that were not in the file; another class takes its own defaults for them.
DEFAULTED = "_use_default_values"


def method_of(config: Mapping[str, Any]) -> str:
    """Name of the method that the config's diffusers class implements."""
    cls = config.get("_class_name")
    if not isinstance(cls, str) or cls not in CLASS_NAMES:
        raise InputError(
            f"scheduler class {cls!r} is unknown; known are {', '.join(CLASS_NAMES)}",
            where="scheduler_config.json",
            fix=f"ask for a scheduler by name: {', '.join(SCHEDULERS)}",
        )
    return CLASS_NAMES[cls]


def from_config(config: Mapping[str, Any], name: str | None = None) -> Scheduler:
    """The scheduler that a diffusers scheduler_config.json describes, or another method over the same noise schedule.

    Args:
        config: the file's content.
        name: a key of `SCHEDULERS`; None takes the method of the config's class. Another method than that reads the
            keys it knows and has its own class's defaults for the rest, as diffusers' `Other.from_config(config)`.
    """
    name = method_of(config) if name is None else name
    if name not in SCHEDULERS:
        raise InputError(f"scheduler {name!r} is unknown", where="scheduler", fix=f"one of {', '.join(SCHEDULERS)}")
    if CLASS_NAMES.get(str(config.get("_class_name"))) != name:
        config = {key: value for key, value in config.items() if key not in config.get(DEFAULTED, ())}
    return SCHEDULERS[name](config)
