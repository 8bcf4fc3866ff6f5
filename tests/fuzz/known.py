"""Faults of diffusers that ours does not copy: by name, with the upstream line and why ours differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.fuzz.case import Case
from tests.fuzz.verdict import Verdict


@dataclass(frozen=True)
class KnownFault:
    """A deviation on purpose.

    Attributes:
        name: in the report.
        upstream: file and line of diffusers 0.42.1 or transformers 5.23.0.
        why: what upstream does and what ours does instead.
        explains: whether it may be the cause of a case's verdict.
    """

    name: str
    upstream: str
    why: str
    explains: Callable[[Case, Verdict], bool]


KNOWN: tuple[KnownFault, ...] = ()


def recognized(case: Case, verdict: Verdict) -> Verdict:
    """The verdict, or "known fault" where one explains it."""
    if verdict.status != "different":
        return verdict
    fault = next((fault for fault in KNOWN if fault.explains(case, verdict)), None)
    return verdict if fault is None else replace(verdict, status="known fault", reason=fault.name)
