"""The accuracy that each precision may lose: one frozen table, which a build spec may tighten or loosen."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from runtimes.errors import InputError


@dataclass(frozen=True)
class Budget:
    """What a build may differ from its source.

    Attributes:
        component_relative_l2: largest ||candidate - reference|| / ||reference|| of any output of any component on
            the reference's own inputs: the error of one call.
        trajectory_relative_l2: the same of any image's final latents: the error after the sampler fed it back.
        image_psnr_db: smallest PSNR of any image, decibels.
        image_ssim: smallest SSIM of any image, at most 1.
        retrieval_points: percentage points of prompt retrieval that may be lost, 0 to 100.
    """

    component_relative_l2: float
    trajectory_relative_l2: float
    image_psnr_db: float
    image_ssim: float
    retrieval_points: float


# fp32 is re-association alone: 1e-6 to 1e-5 a call, so the budget of 1e-4 leaves room for fused kernels of other
# hardware and none for a wrong weight. bf16 has 8 bits of mantissa to fp16's 11: 8 times fp16's rounding.
# int8 is two to three times what the hybrid recipe loses on the reference model (0.061 a call at its worst shape, 0.105
# in the final latents, no retrieval), its images no worse than bf16 allows (they have 29 dB, SSIM 0.95).
# Below 16 bits the sampler walks to a different image of the same prompt: PSNR then only catches broken images,
# and what the user loses is said by retrieval, which is why its budget stays small.
PRUNED = "pruned"
BUDGETS: Mapping[str, Budget] = MappingProxyType({
    "fp32": Budget(1e-4, 1e-3, 50.0, 0.995, 0.5),
    "fp16": Budget(1e-2, 5e-2, 25.0, 0.90, 1.0),
    "bf16": Budget(5e-2, 2e-1, 15.0, 0.60, 2.0),
    "int8": Budget(1.5e-1, 3.5e-1, 15.0, 0.60, 2.0),
    "int4": Budget(3e-1, 7e-1, 10.0, 0.30, 5.0),
    "auto": Budget(1.5e-1, 3.5e-1, 15.0, 0.60, 2.0),
    PRUNED: Budget(6e-1, 1.0, 8.0, 0.20, 5.0),
})


def budget_for(precision: str, overrides: Mapping[str, float] | None = None) -> Budget:
    """The budget of a precision with the user's changes.

    Args:
        precision: a key of `BUDGETS`.
        overrides: new values by field of `Budget`.

    Raises:
        InputError: an unknown precision or key (with near matches), or a value that is no sensible limit.
    """
    if precision not in BUDGETS:
        raise InputError(f"no parity budget for the precision {precision!r}", where="precision",
                         fix=_near(precision, list(BUDGETS)))
    fields = [f.name for f in dataclasses.fields(Budget)]
    checked: dict[str, float] = {}
    for key, value in (overrides or {}).items():
        if key not in fields:
            raise InputError(f"unknown parity budget {key!r}", where="budget", fix=_near(key, fields))
        checked[key] = _checked(key, value)
    return dataclasses.replace(BUDGETS[precision], **checked)


def _checked(key: str, value: object) -> float:
    highest = {"image_ssim": 1.0, "retrieval_points": 100.0}.get(key, math.inf)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{key} is {value!r}, expected a finite number", where="budget")
    if not 0 <= value <= highest:
        bound = f"from 0 to {highest:g}" if math.isfinite(highest) else "of at least 0"
        raise InputError(f"{key} is {value!r}, expected a number {bound}", where="budget")
    return float(value)


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"
