"""What a run of the fuzzer found: counts by verdict, reasons, and how often each value was met."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED = ("equal", "flat", "near tie", "refused", "refused by both", "known fault", "unverified")
MOST_REFUSED = 0.05  # of what diffusers runs
MET = 20  # times in 2,000 cases
_WITH_REASONS = ("refused", "near tie", "known fault", "unverified", "refused by both", "different", "fuzzer broke")
_SHOWN = 25


@dataclass(frozen=True)
class Result:
    """One case that was run; `met` are the choices it consists of."""

    number: int
    status: str
    reason: str
    detail: str
    diffusers_runs: bool
    met: tuple[tuple[str, str], ...]
    seconds: float


@dataclass
class Report:
    """Results added up."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    diffusers_ran: int = 0

    def add(self, result: Result) -> None:
        """Count one result."""
        self.statuses[result.status] += 1
        self.reasons.setdefault(result.status, Counter())[result.reason] += 1
        self.met.update(result.met)
        self.seconds += result.seconds
        self.diffusers_ran += result.diffusers_runs
        if result.status not in PASSED:
            self.failures.append(result)

    @property
    def tried(self) -> int:
        """Cases."""
        return sum(self.statuses.values())

    @property
    def refused_share(self) -> float:
        """Of what diffusers runs, 0 to 1."""
        return self.statuses["refused"] / max(self.diffusers_ran, 1)

    def least_met(self) -> list[tuple[int, str, str]]:
        """(times, name, value), the rarest first."""
        return sorted((count, name, value) for (name, value), count in self.met.items())

    def text(self) -> str:
        """For the terminal."""
        lines = [f"cases {self.tried}, {self.seconds:.0f} s of work, diffusers ran {self.diffusers_ran}"]
        lines += [f"  {count:5d}  {status}" for status, count in self.statuses.most_common()]
        lines.append(f"  refused of what diffusers runs: {self.refused_share:.1%} (at most {MOST_REFUSED:.0%})")
        for status in _WITH_REASONS:
            if status in self.reasons:
                lines += ["", f"{status}:"]
                lines += [f"  {count:5d}  {reason}" for reason, count in self.reasons[status].most_common(_SHOWN)]
        least = self.least_met()
        wanted = MET * self.tried / 2000
        lines += ["", f"values met: {len(least)}; fewer than {wanted:.0f} times (20 in 2,000): "
                      f"{sum(count < wanted for count, _, _ in least)}; the rarest:"]
        lines += [f"  {count:5d}  {name} = {value}" for count, name, value in least[:10]]
        return "\n".join(lines)

    def save(self, file: Path) -> None:
        """All of it as JSON."""
        content: dict[str, Any] = {
            "cases": self.tried, "seconds": round(self.seconds, 1), "statuses": self.statuses, "reasons": self.reasons,
            "refused_of_what_diffusers_runs": self.refused_share,
            "met": {f"{name} = {value}": count for count, name, value in self.least_met()},
            "failures": [{**asdict(result), "met": None} for result in self.failures]}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def total(results: Iterable[Result]) -> Report:
    """Add results up."""
    report = Report()
    for result in results:
        report.add(result)
    return report
