"""What a client keeps of a soak: every request and its end, the images of each, and whether memory grew."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import time

ENDS = ("completed", "failed", "cancelled")


@dataclass
class Ledger:
    """Every request's end, written to a file as it comes.

    Attributes:
        file: receives a JSON line for each.
        ends: how often an action ended how: ("stream", "completed").
        images: digests of the images that a request's number got, of each time that it was asked for.
        accepted: ids of jobs that the server said it had accepted, and the number of their request; none twice.
        ended: how each accepted job was last seen to have ended.
        faults: what must not happen, in words.
        statuses: of HTTP, how often.
    """

    file: Path
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: dict[int, list[tuple[str, ...]]] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def end(self, action: str, how: str, number: int, detail: str = "") -> None:
        """An action came to its end."""
        self.ends[action, how] += 1
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([time(), action, how, number, detail]) + "\n")

    def fault(self, what: str) -> None:
        """Something happened that must not."""
        self.faults.append(what)
        self.end("fault", "noted", -1, what)

    def made(self, number: int, digests: Sequence[str]) -> None:
        """A request got its images."""
        self.images.setdefault(number, []).append(tuple(digests))

    def accept(self, identity: str, number: int, *, again: bool = False) -> None:
        """A job was accepted; `again` where its idempotency key was sent a second time."""
        if again != (identity in self.accepted):
            self.fault(f"job {identity}: {'a new job for an old key' if again else 'an id that came before'}")
        self.accepted[identity] = number

    def job_ended(self, identity: str, status: str) -> None:
        """A job was seen with this status; one that ends it must stay."""
        if status not in ENDS:
            return
        before = self.ended.setdefault(identity, status)
        if before != status:
            self.fault(f"job {identity} has two ends: {before}, then {status}")

    @property
    def lost(self) -> list[str]:
        """Accepted jobs that did not end."""
        return [identity for identity in self.accepted if self.ended.get(identity) not in ENDS]

    def wrong(self, lone: Mapping[int, Sequence[str]]) -> list[int]:
        """Numbers of requests that once got other images than alone; those of which no lone run is there are wrong."""
        return [number for number, every in self.images.items()
                if any(tuple(lone.get(number, ())) != one for one in every)]


def growth(samples: Iterable[tuple[float, float]]) -> float:
    """By which share a quantity grew from the first to the last sample, along the straight line nearest to all.

    Args:
        samples: seconds and bytes, two or more at different times.
    """
    times, values = zip(*samples, strict=True)
    slope, start = statistics.linear_regression(times, values)
    first = start + slope * times[0]
    return float(slope * (times[-1] - times[0]) / first)
