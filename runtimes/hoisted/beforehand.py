"""Runs the parts of a denoiser that need no sample: once a prompt, once a schedule, once a request. Stores what they
give, for jobs to feed it row by row."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner
from runtimes.backends.session import Session
from runtimes.bundle.roles import PER_PROMPT, PER_REQUEST, PER_STEP, Roles
from runtimes.text.prompt_cache import PromptCache

Values = Mapping[str, NDArray[Any]]
PROMPTS = 4  # whose values the cache has room for, however large those of one are


@dataclass(frozen=True)
class Tables:
    """What the denoiser is fed at each step of one job besides sample and conditions.

    Every array holds features of any scale, in the dtype that the denoiser's TensorSpec says.

    Attributes:
        steps: input -> (T, ...), one entry for each of the T steps, the same for all rows.
        rows, rows_uncond: for each image input -> (T, ...), for its prompt and for its negative prompt.
    """

    steps: Values = field(default_factory=dict)
    rows: Sequence[Values] = ()
    rows_uncond: Sequence[Values] = ()

    def at(self, step: int, rows: Sequence[int], branches: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The values of one step for some rows, branch by branch: (branches * len(rows), ...) by input.

        Args:
            step: from 0.
            rows: which; those beyond the images are the images' again.
            branches: 0 is the negative prompt's, 1 the prompt's.
        """
        fed = {name: np.repeat(table[step : step + 1], len(branches) * len(rows), axis=0)
               for name, table in self.steps.items()}
        if self.rows:
            picked = [of[row % len(of)] for of in ((self.rows_uncond, self.rows)[b] for b in branches) for row in rows]
            fed |= {name: np.stack([values[name][step] for values in picked]) for name in self.rows[0]}
        return fed


class Beforehand:
    """The entries of a denoiser that run before the first step. Threads may share one.

    Each call holds the rows of one prompt or one schedule alone, so that nothing depends on who else is waiting.
    """

    def __init__(self, roles: Roles, cache_bytes: int, release: Callable[[str], None] | None = None) -> None:
        """Remember the parts.

        Args:
            roles: name the entries.
            cache_bytes: bound of the cache of what they give, which grows until `PROMPTS` prompts fit.
            release: closes the session of a component after its calls, where memory is short; then nothing is cached.
        """
        self._roles, self._release = roles, release
        self._cache = PromptCache(cache_bytes)
        self._lock = threading.Lock()

    def prompts(self, sessions: Mapping[str, Session], rows: Sequence[Values]) -> list[Values]:
        """What the denoiser takes that nothing but the prompts decides: of each prompt, input -> its row.

        Args:
            sessions: the networks as the request may run them.
            rows: of each prompt what it became, as feeds of one row: (1, ...), dtype and meaning of the TensorSpecs.

        Returns:
            arrays (...) of features of any scale, in the dtype of the TensorSpec.
        """
        if PER_PROMPT not in self._roles.denoiser.entries:
            return []
        found = [self._run(PER_PROMPT, sessions, row) for row in rows]
        return [{name: array[0] for name, array in values.items()} for values in found]

    def tables(self, sessions: Mapping[str, Session], rows: Sequence[Values], rows_uncond: Sequence[Values],
               timesteps: Sequence[float], latents: tuple[int, int]) -> Tables:
        """What the denoiser takes at each step.

        Args:
            sessions: the networks as the request may run them.
            rows, rows_uncond: of each prompt and each negative prompt what it became, as feeds of one row, (1, ...)
                with dtype and meaning of the TensorSpecs: features of any scale.
            timesteps: of the steps.
            latents: height and width of the samples.
        """
        entries, role = self._roles.denoiser.entries, self._roles.denoiser
        times = {role.timestep: np.array(timesteps, np.float32)}
        steps = self._run(PER_STEP, sessions, times) if PER_STEP in entries else {}
        if PER_REQUEST not in entries:
            return Tables(steps)
        component = sessions[role.component].component
        channels = next(spec.shape[1] for spec in component.inputs if spec.name == role.sample)
        whole = {role.sample: np.zeros((len(timesteps), int(channels), *latents), np.float32)}  # its shape alone counts
        found, uncond = ([self._run(PER_REQUEST, sessions, times | whole | {
            name: np.repeat(array, len(timesteps), axis=0) for name, array in row.items()}) for row in branch]
                         for branch in (rows, rows_uncond))
        return Tables(steps, found, uncond)

    def _run(self, kind: str, sessions: Mapping[str, Session], feeds: Values) -> Values:
        """The outputs of an entry, from the cache if it gave them before: (rows, ...) by name, read-only."""
        component = self._roles.denoiser.entries[kind].component
        if self._release is None:
            return self._cached(sessions[component], feeds)
        with self._lock:  # or another thread's call would meet a session that closes
            try:
                return _computed(sessions[component], feeds)
            finally:
                self._release(component)

    def _cached(self, session: Session, feeds: Values) -> Values:
        fed = {spec.name: feeds[spec.name] for spec in session.component.inputs}
        key = _digest(session.name, fed)
        names = [spec.name for spec in session.component.outputs]
        known = {name: array for name in names if (array := self._cache.get(key + name.encode())) is not None}
        if len(known) < len(names):
            known = _computed(session, fed)
            self._cache.grow(PROMPTS * sum(array.nbytes for array in known.values()))
            for name, array in known.items():
                self._cache.put(key + name.encode(), array)
        return known


def _computed(session: Session, feeds: Values) -> dict[str, NDArray[Any]]:
    """One call with all rows, or as few as the session takes them in: (rows, ...) by name, read-only."""
    fed = {spec.name: feeds[spec.name] for spec in session.component.inputs}
    values = RowRunner(session, len(next(iter(fed.values())))).run(fed)
    for array in values.values():
        array.setflags(write=False)
    return values


def _digest(name: str, feeds: Values) -> bytes:
    """Of a component and what it is fed."""
    found = hashlib.blake2b(name.encode(), digest_size=16)
    for key, array in feeds.items():
        found.update(f"{key} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.digest()
