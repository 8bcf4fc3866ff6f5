"""Which moments of which drawings calibration looks at: prompts from a file, strata of prompts and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import InputError

CALLS_PER_EPISODE = 8  # six from text to image, two from image to image
STEPS = 20
STRENGTH = 0.6
LEAST_SAMPLES = CALLS_PER_EPISODE
_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 fill the unit interval evenly, however many there are


def read_prompts(file: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines do not count.

    Raises:
        InputError: unreadable, not UTF-8, or without a prompt.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}", where=str(file),
                         fix="save it as UTF-8, one prompt a line") from error
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror}", where=str(file)) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputError("there is no prompt in it", where=str(file), fix="write one prompt a line")
    return prompts


@dataclass(frozen=True)
class Episode:
    """One drawing from a prompt, and a second one that starts from the first's picture: what one shard holds.

    Attributes:
        prompt: of the first drawing.
        second_prompt: of the drawing that starts from its picture.
        seed: of the first drawing; the second uses the next one.
        keep, second_keep: U-Net calls that are recorded, counted from 0 in each drawing.
    """

    prompt: str
    second_prompt: str
    seed: int
    keep: tuple[int, ...]
    second_keep: tuple[int, ...]


def plan_episodes(prompts: Sequence[str], samples: int, *, steps: int = STEPS, strength: float = STRENGTH,
                  seed: int = 0) -> tuple[Episode, ...]:
    """Spread samples over prompts and over the whole noise schedule.

    Each episode records one call from each of six equal parts of the schedule, the place inside the part shifting
    from episode to episode, so that together they cover every step equally often whatever their number.

    Args:
        prompts: used in turn.
        samples: U-Net calls to record; both guidance branches are in each.
        steps: of a drawing.
        strength: of the drawings that start from a picture.
        seed: of the first episode.

    Raises:
        InputError: no prompts, or so few samples that a part of the schedule would go unseen.
    """
    if not prompts:
        raise InputError("no calibration prompts", where="calibration prompts", fix="give at least one")
    if samples < LEAST_SAMPLES:
        raise InputError(f"{samples} {'sample says' if samples == 1 else 'samples say'} nothing about the range of "
                         "activations over the noise schedule", where="calibration samples",
                         fix=f"use at least {LEAST_SAMPLES}; 128 is the default")
    second_steps = max(1, min(steps, int(steps * strength)))
    episodes: list[Episode] = []
    left = samples
    while left:
        number = len(episodes)
        second = min(left // 4, CALLS_PER_EPISODE // 4)
        first = min(left - second, CALLS_PER_EPISODE - second)
        shift = number * _GOLDEN % 1.0
        episodes.append(Episode(prompts[number % len(prompts)], prompts[(number + 1) % len(prompts)],
                                seed + 2 * number, _strata(first, steps, shift), _strata(second, second_steps, shift)))
        left -= first + second
    return tuple(episodes)


def _strata(count: int, steps: int, shift: float) -> tuple[int, ...]:
    """One step of each of `count` equal parts of 0..steps-1."""
    return tuple(sorted({min(steps - 1, int((part + shift) * steps / count)) for part in range(count)}))
