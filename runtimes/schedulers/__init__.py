"""Samplers in numpy, equal to diffusers' step by step, with all randomness drawn by the caller.

`from_config` reads a diffusers scheduler_config.json into a `Scheduler`; `Scheduler.start` begins a `Run`.
One method a file; sigmas.py has the noise schedules, prediction.py the meaning of a model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from runtimes.errors import InputError
from runtimes.schedulers.ddim import Ddim
from runtimes.schedulers.dpmpp import DpmSolverPP
from runtimes.schedulers.euler import Euler, EulerAncestral
from runtimes.schedulers.lcm import Lcm
from runtimes.schedulers.pndm import Pndm
from runtimes.schedulers.protocol import Run, Scheduler
from runtimes.schedulers.unipc import UniPc

__all__ = ["CLASS_NAMES", "DEFAULTED", "SCHEDULERS", "Run", "Scheduler", "from_config", "method_of"]

SCHEDULERS: Mapping[str, Callable[[Mapping[str, Any]], Scheduler]] = MappingProxyType(
    {
        "ddim": Ddim.from_config,
        "euler": Euler.from_config,
        "euler-ancestral": EulerAncestral.from_config,
        "dpm++": DpmSolverPP.from_config,
        "unipc": UniPc.from_config,
        "lcm": Lcm.from_config,
        "pndm": Pndm.from_config,
    }
)

CLASS_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "ddim",
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler-ancestral",
        "DPMSolverMultistepScheduler": "dpm++",
        "UniPCMultistepScheduler": "unipc",
        "LCMScheduler": "lcm",
        "PNDMScheduler": "pndm",
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
