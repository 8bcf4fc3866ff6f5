"""Cuts a run in parts: the base model denoises the first share of the noise schedule, a refiner the rest.

Shares are of the training schedule, as `denoising_end` of diffusers' StableDiffusionXLPipeline and `denoising_start` of
its StableDiffusionXLImg2ImgPipeline count them.
"""

from __future__ import annotations

from runtimes.errors import InputError
from runtimes.schedulers import Run, Scheduler


def begin_part(scheduler: Scheduler, steps: int, part: tuple[float, float], strength: float, eta: float,
               ) -> tuple[Run, int]:
    """A run over a part of the schedule.

    Args:
        scheduler: gives the length of the training schedule.
        steps: of the whole schedule.
        part: first and last share of the noise schedule, 0 is pure noise and 1 a clean image.
        strength, eta: see `Scheduler.start`; a part that begins later has its own strength.

    Returns:
        the run, and how many of its steps belong to the part: none where a first part ends above the run's noise.

    Raises:
        InputError: a later part that holds no step.
    """
    first, last = part
    total, run = scheduler.num_train_timesteps, scheduler.start(steps, 1.0 if first > 0 else strength, eta)
    if first > 0:
        left = sum(float(t) < _cutoff(total, first) for t in run.timesteps)
        if scheduler.order == 2 and left % 2 == 0:
            left += 1  # not in the middle of a step, as diffusers counts
        if not 1 <= left <= len(run.timesteps):
            raise _empty(part, steps)
        run = scheduler.start(steps, 1.0, eta, skip=len(run.timesteps) - left)
    count = len(run.timesteps) if last >= 1 else sum(float(t) >= _cutoff(total, last) for t in run.timesteps)
    return run, count  # of a first part perhaps none: then the next one starts from noise, as in diffusers


def _cutoff(total: int, share: float) -> int:
    return round(total - share * total)


def _empty(part: tuple[float, float], steps: int) -> InputError:
    return InputError(f"none of {steps} steps lies within {part}", where="part", fix="use more steps")
