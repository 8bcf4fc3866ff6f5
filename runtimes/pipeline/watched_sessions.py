"""Wraps the sessions of one job, so that they can be stopped and timed, and a missing one is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from runtimes.backends.session import Arrays, Session, WrappedSession
from runtimes.backends.time_profile import Profile
from runtimes.errors import BundleError


class WatchedSessions(Mapping[str, Session]):
    """Sessions by the name of their component."""

    def __init__(self, sessions: Mapping[str, Session], check: Callable[[], None] | None = None,
                 *profiles: Profile) -> None:
        """Watch sessions.

        Args:
            sessions: looked up when asked for.
            check: called before every call of a network; what it raises ends the job.
            profiles: where the time of every call is added.
        """
        self._sessions, self._check, self._profiles = sessions, check, profiles

    def __getitem__(self, name: str) -> Session:
        try:
            session = self._sessions[name]
        except KeyError:
            raise BundleError(f"this pipeline has no {name}", where=name,
                              fix=f"it has {', '.join(sorted(self._sessions))}") from None
        session = session if self._check is None else _Stoppable(session, self._check)
        for profile in self._profiles:
            session = profile.watch(session)
        return session

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


class _Stoppable(WrappedSession):
    """A session that asks before every call: a step of a large image has hundreds of them."""

    def __init__(self, inner: Session, check: Callable[[], None]) -> None:
        super().__init__(inner)
        self._check = check

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self._check()
        return super()._run(feeds)
