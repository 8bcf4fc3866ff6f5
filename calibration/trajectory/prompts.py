"""Plans which calls of which trajectories calibration records: prompts of a file, timesteps and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calibration.trajectory.inpainting_masks import KINDS
from runtimes.errors import InputError
from runtimes.system.text_files import lines_of, read_text

CALLS_PER_EPISODE = 8
SECOND_CALLS, MASKED_CALLS = 2, 4  # of these in the second trajectory: image to image, inpainting
STEPS = 20
STRENGTH = 0.6
LEAST_SAMPLES = CALLS_PER_EPISODE
_GOLDEN = 0.6180339887498949  # multiples of it modulo 1 fill the unit interval evenly, however many there are
_SILVER = 0.4142135623730951  # so do this one's, and together they do not run in step
_SMALLEST, _LARGEST = 0.03, 0.93  # painted shares; what is larger paints everything
_PARTIAL_IN = 3  # one trajectory under a mask in so many; prime to the kinds of masks, so that each meets each


def read_prompts(file: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines do not count.

    Raises:
        InputError: as `read_text`, or a file without a prompt.
    """
    prompts = tuple(line.strip() for line in lines_of(read_text(file)) if line.strip())
    if not prompts:
        raise InputError("there is no prompt in it", where=str(file), fix="write one prompt a line")
    return prompts


@dataclass(frozen=True)
class Episode:
    """One trajectory from a prompt, and a second one that starts from the first's image: what one shard holds.

    Attributes:
        prompt: of the first trajectory.
        second_prompt: of the trajectory that starts from its image.
        seed: of the first trajectory; the second uses the next one.
        keep, second_keep: U-Net calls that are recorded, counted from 0 in each trajectory.
    """

    prompt: str
    second_prompt: str
    seed: int
    keep: tuple[int, ...]
    second_keep: tuple[int, ...]


@dataclass(frozen=True)
class InpaintingEpisode(Episode):
    """One of a U-Net trained for inpainting: its second trajectory paints a part of the first's image anew.

    A type of its own, so that the episodes of other U-Nets, and what is recorded of them, keep their identity.

    Attributes:
        strength: of the second trajectory; 1 starts from noise alone, as diffusers does by default.
        mask: kind of the mask, one of `inpainting_masks.KINDS`.
        painted: share of the image under it; 1 is all.
    """

    strength: float
    mask: str
    painted: float


def plan_episodes(prompts: Sequence[str], samples: int, *, steps: int = STEPS, strength: float = STRENGTH,
                  seed: int = 0, inpaints: bool = False) -> tuple[Episode, ...]:
    """Spread samples over prompts and over the whole noise schedule.

    Each episode records one call from each of six equal parts of the schedule, the place inside the part shifting
    from episode to episode, so that together they cover every step equally often whatever their number. A U-Net for
    inpainting is asked for images under masks above all: half of its calls are, one from each of four parts of the
    schedule, two samples of three from noise alone. The other half paints everything anew, which is what text to
    image is to it.

    Args:
        prompts: used in turn.
        samples: U-Net calls to record; both guidance branches are in each.
        steps: of a trajectory.
        strength: of the trajectories that start from an image.
        seed: of the first episode.
        inpaints: whether the U-Net takes a mask and a masked image: gives `InpaintingEpisode`s.

    Raises:
        InputError: no prompts, or so few samples that a part of the schedule would go unseen.
    """
    if not prompts:
        raise InputError("no calibration prompts", where="calibration prompts", fix="give at least one")
    if samples < LEAST_SAMPLES:
        raise InputError(f"{samples} {'sample says' if samples == 1 else 'samples say'} nothing about the range of "
                         "activations over the noise schedule", where="calibration samples",
                         fix=f"use at least {LEAST_SAMPLES}; 128 is the default")
    seconds = MASKED_CALLS if inpaints else SECOND_CALLS
    episodes: list[Episode] = []
    left = samples
    while left:
        number = len(episodes)
        second = min(left * seconds // CALLS_PER_EPISODE, seconds)
        first = min(left - second, CALLS_PER_EPISODE - second)
        shift = number * _GOLDEN % 1.0
        share = 1.0 if inpaints and (number + 1) % _PARTIAL_IN else strength
        episode = Episode(prompts[number % len(prompts)], prompts[(number + 1) % len(prompts)], seed + 2 * number,
                          _strata(first, steps, shift),
                          _strata(second, max(1, min(steps, int(steps * share))), shift))
        episodes.append(_masked(episode, number, share) if inpaints else episode)
        left -= first + second
    return tuple(episodes)


def _masked(episode: Episode, number: int, strength: float) -> InpaintingEpisode:
    """The episode with the mask of its second trajectory: kinds in turn, areas of all sizes, half below a third."""
    kinds = tuple(KINDS)
    place = (0.5 + number * _SILVER) % 1.0  # begins in the middle: a single episode should be no extreme
    painted = _SMALLEST + place**2 * (1 - _SMALLEST)
    return InpaintingEpisode(**asdict(episode), strength=strength, mask=kinds[number % len(kinds)],
                             painted=painted if painted <= _LARGEST else 1.0)


def _strata(count: int, steps: int, shift: float) -> tuple[int, ...]:
    """One step of each of `count` equal parts of 0..steps-1."""
    return tuple(sorted({min(steps - 1, int((part + shift) * steps / count)) for part in range(count)}))
