"""Chooses quality presets: settings of the sampling loop that `deploy tradeoffs` measured to be worth their time.

Measuring is `deploy.bench.tradeoffs`; this reads what it left, needs the base dependencies only and runs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtimes.bundle.folder import replacing
from runtimes.errors import InputError, UnavailableError
from runtimes.system.cache_root import cache_home

QUALITIES = ("draft", "balanced", "high")
DRAFT_POINTS = 2.0  # of retrieval that a draft may lose
DRAFT_PSNR_DB = 20.0  # where there is no retrieval: the same image, details differ


@dataclass(frozen=True)
class Setting:
    """What a preset decides; the words are those of `Pipeline.__call__`. A scheduler of None is the bundle's own."""

    steps: int
    scheduler: str | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cache_interval: int = 1

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A setting with its cost and its accuracy.

    Attributes:
        milliseconds: median for one image on this machine.
        psnr_db: mean over images, to a long run of the bundle's own sampler from the same noise.
        retrieval: share of prompts found again, 0 to 1; None for models without a gallery.
    """

    setting: Setting
    milliseconds: float
    psnr_db: float
    retrieval: float | None

    @property
    def accuracy(self) -> tuple[float, float]:
        """What settings are compared by: retrieval first, since more decibels cannot make up for another subject."""
        return -1.0 if self.retrieval is None else self.retrieval, self.psnr_db


def front(measured: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats in both time and accuracy, fastest first: the Pareto front."""
    best: list[Measured] = []
    for entry in sorted(measured, key=lambda m: (m.milliseconds, -m.accuracy[0], -m.accuracy[1])):
        if not best or entry.accuracy > best[-1].accuracy:
            best.append(entry)
    return best


def preset(quality: str, measured: Sequence[Measured]) -> Measured:
    """The setting of a preset.

    high is the most accurate, draft the fastest within 2 points of its retrieval (without a gallery: within 20 dB of a
    long run), balanced the one on the front whose time is nearest to their geometric mean.

    Raises:
        InputError: no such preset.
    """
    if quality not in QUALITIES:
        raise InputError(f"unknown quality {quality!r}", where="--quality", fix=f"one of {', '.join(QUALITIES)}")
    candidates = front(measured)
    high = candidates[-1]
    draft = next(m for m in candidates if m is high or _good_enough(m, high))
    if quality != "balanced":
        return high if quality == "high" else draft
    between = [m for m in candidates if draft.milliseconds <= m.milliseconds <= high.milliseconds]
    middle = math.sqrt(draft.milliseconds * high.milliseconds)
    return min(between, key=lambda m: abs(math.log(m.milliseconds / middle)))


def _good_enough(entry: Measured, high: Measured) -> bool:
    if entry.retrieval is None or high.retrieval is None:
        return entry.psnr_db >= DRAFT_PSNR_DB
    return 100 * (high.retrieval - entry.retrieval) <= DRAFT_POINTS


def within(milliseconds: float, measured: Sequence[Measured]) -> Measured:
    """The most accurate setting that takes at most so long for one image.

    Raises:
        InputError: even the fastest takes longer.
    """
    candidates = front(measured)
    affordable = [m for m in candidates if m.milliseconds <= milliseconds]
    if not affordable:
        raise InputError(f"the fastest setting takes {candidates[0].milliseconds:.0f} ms on this machine",
                         where="--budget-ms", fix=f"allow at least {math.ceil(candidates[0].milliseconds)}")
    return affordable[-1]


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """As JSON: every setting, whether it is on the front, and which the presets are."""
    best = front(measured)
    return {"settings": [{**asdict(m), "on_front": m in best} for m in measured],
            "presets": {quality: asdict(preset(quality, measured)) for quality in QUALITIES}}


def save(digest: str, measured: Sequence[Measured]) -> Path:
    """Keep what was measured of a bundle on this machine; the bundle itself stays as it was built."""
    file = _file(digest)
    with replacing(file) as partial:
        partial.write_text(json.dumps([asdict(m) for m in measured], indent=2) + "\n", encoding="utf-8")
    return file


def load(digest: str) -> list[Measured]:
    """What was measured of a bundle on this machine.

    Raises:
        UnavailableError: nothing was, or the file is damaged.
    """
    try:
        entries = json.loads(_file(digest).read_text(encoding="utf-8"))
        found = []
        for entry in entries:
            setting = entry.pop("setting")
            setting["guidance_interval"] = tuple(setting["guidance_interval"])
            found.append(Measured(Setting(**setting), **entry))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found = []
    if not found:
        raise UnavailableError("nothing was measured of this bundle on this machine", where="--quality",
                               fix="run `deploy tradeoffs BUNDLE` once, or give --steps and --scheduler")
    return found


def _file(digest: str) -> Path:
    return cache_home() / "tradeoffs" / f"{digest}.json"
