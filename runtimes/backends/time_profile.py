"""Measures where the time of a call goes: seconds inside each component, and what is left to Python."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from runtimes.backends.session import Arrays, Session, WrappedSession


class Profile:
    """Filled by the calls it is given to: `pipeline(..., profile=profile)`. One thread at a time.

    Attributes:
        total_seconds: from the start of a call to its result.
        seconds: inside each component.
        calls: how often each component ran.
    """

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    @property
    def python_seconds(self) -> float:
        """Everything outside the components: tokenizing, scheduler, guidance, random numbers, images."""
        return self.total_seconds - sum(self.seconds.values())

    @property
    def python_share(self) -> float:
        """`python_seconds` as a share of the total."""
        return self.python_seconds / self.total_seconds if self.total_seconds else 0.0

    def watch(self, session: Session) -> Session:
        """`session` with its time recorded here."""
        return _Watched(session, self)


class _Watched(WrappedSession):
    """Adds the seconds of each call to a profile, failed calls included."""

    def __init__(self, inner: Session, profile: Profile) -> None:
        super().__init__(inner)
        self._profile = profile

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        start = perf_counter()
        try:
            return super()._run(feeds)
        finally:
            self._profile.seconds[self.name] += perf_counter() - start
            self._profile.calls[self.name] += 1
