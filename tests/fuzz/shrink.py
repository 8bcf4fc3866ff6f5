"""From a failing case to the plainest one that fails in the same way, by Hypothesis."""

from __future__ import annotations

import random
import time

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import HypothesisException, NoSuchExample

from tests.fuzz.case import Case
from tests.fuzz.cases import cases
from tests.fuzz.run import run_case


def shrink(number: int, reason: str, seconds: float) -> Case | None:
    """The plainest case found whose verdict is "different" for the same reason.

    Args:
        number: of the failing case.
        reason: of its verdict.
        seconds: after which nothing new is tried.
    """
    end, known, plainest = time.monotonic() + seconds, dict[str, bool](), list[Case]()

    def fails(case: Case) -> bool:
        text = repr(case)
        if text not in known:
            if time.monotonic() > end:
                return False
            verdict = run_case(case)[0]
            known[text] = verdict.status == "different" and verdict.reason == reason
            if known[text]:
                plainest.append(case)
        return known[text]

    options = settings(max_examples=20, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
                       suppress_health_check=list(HealthCheck))
    try:
        return find(cases(number), fails, settings=options, random=random.Random(number))
    except (NoSuchExample, HypothesisException):  # out of time before it could be confirmed
        return plainest[-1] if plainest else None
