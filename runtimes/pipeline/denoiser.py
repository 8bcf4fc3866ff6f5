"""Runs the denoiser over the rows of many jobs: decides which share a call, feeds them, and hands out the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner, row_range, slices
from runtimes.backends.session import Session
from runtimes.bundle.roles import NEGATIVE, Roles
from runtimes.pipeline.job import Asked, Job, Rows, images_at_once, profiles_of, sessions_of
from runtimes.pipeline.memory_budget import MemoryBudget

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Rows of one job that are part of a call."""

    asked: Asked
    rows: Rows

    @property
    def width(self) -> int:
        """Rows of the call that it takes."""
        return len(self.rows) * (2 if self.asked.guided else 1)


class DenoiserCalls:
    """Calls of the denoiser for one step of each of several jobs. Threads may share one.

    Rows share a call where it is the same entry of the denoiser, and where shape and length of the context are equal.
    Timestep, guidance and prompt are each row's own. A call holds both branches of its images.
    """

    def __init__(self, sessions: Mapping[str, Session], roles: Roles, memory: MemoryBudget | None,
                 shares: Callable[[str], bool]) -> None:
        """Remember the parts.

        Args:
            sessions: the networks.
            roles: name the denoiser, its entries, inputs and output.
            memory: how many images share a call; as many as the denoiser takes if None.
            shares: whether rows of several jobs may share a call of a component.
        """
        self._sessions, self._roles, self._memory, self._shares = sessions, roles, memory, shares
        negative_first = roles.guidance.branches[0] == NEGATIVE
        self._order = (0, 1) if negative_first else (1, 0)
        self._most: dict[str, int] = {}

    def evaluate(self, jobs: Sequence[Job]) -> list[Asked]:
        """Predict for the next step of each job; one whose rows cannot be computed has an error afterwards."""
        groups: dict[tuple[Any, ...], list[Piece]] = {}
        asked = []
        for job in jobs:
            one = job.ask()
            asked.append(one)
            entry = self._component(one)
            alone = job.plan.wanted.tiling is not None or not self._shares(entry)
            for length, rows in job.rows_by_length:
                key = entry, length, one.sample.shape[1:], id(job) if alone else None
                groups.setdefault(key, []).append(Piece(one, rows))
        for (component, *_), pieces in groups.items():
            for call in self._calls(component, pieces):
                self._call(component, call)
        return asked

    def _component(self, asked: Asked) -> str:
        shallow = self._roles.denoiser.shallow
        return self._roles.denoiser.component if asked.whole or shallow is None else shallow.component

    def _calls(self, component: str, pieces: list[Piece]) -> list[list[Piece]]:
        """Cut what may share calls into calls: by the rows that the network takes and the images that memory allows."""
        lead = pieces[0]
        most, limit = self._rows_of(component, lead.asked.job), self._images_at_once(pieces)
        if len(pieces) == 1 and lead.width <= most and len(lead.rows) <= (limit or most):
            return [pieces]
        images = [(piece.asked, row) for piece in pieces for row in piece.rows]
        widths = {2 if asked.guided else 1 for asked, _ in images}
        if len(widths) == 1:
            count = max(most // widths.pop(), 1)
            return [_together(images[part]) for part in slices(len(images), min(count, limit or count))]
        calls: list[list[tuple[Asked, int]]] = [[]]
        room = most
        for image in images:
            width = 2 if image[0].guided else 1
            if calls[-1] and (width > room or len(calls[-1]) == limit):
                calls.append([])
                room = most
            calls[-1].append(image)
            room -= width
        return [_together(call) for call in calls]

    def _rows_of(self, component: str, job: Job) -> int:
        """The most rows that a call of the network takes."""
        if component not in self._most:
            self._most[component] = row_range(job.plan.sessions[component]).max
        return self._most[component]

    def _images_at_once(self, pieces: list[Piece]) -> int | None:
        jobs = _jobs_of(pieces)
        copies = 2 if any(job.plan.wanted.negatives for job in jobs) else 1
        return images_at_once(jobs, self._memory, sum(len(piece.rows) for piece in pieces), copies)

    def _call(self, component: str, pieces: list[Piece]) -> None:
        """Run one call and give each job its part. If it fails, each runs alone: what fails then is that job's own."""
        pieces = [piece for piece in pieces if piece.asked.job.live()]
        if not pieces:
            return
        try:
            outputs = self._run(component, pieces)
        except Exception as error:
            jobs = _jobs_of(pieces)
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            for job in jobs:
                self._call(component, [piece for piece in pieces if piece.asked.job is job])
            return
        images = sum(len(piece.rows) for piece in pieces)
        for job in _jobs_of(pieces):
            job.calls, job.company = job.calls + 1, job.company + images
        prediction, at = outputs[self._roles.denoiser.output], 0
        if prediction.dtype != np.float32:
            prediction = prediction.astype(np.float32)
        for piece in pieces:
            part = slice(at, at + piece.width)
            at = part.stop
            job, shallow = piece.asked.job, self._roles.denoiser.shallow
            try:
                piece.asked.put(piece.rows, self._combined(piece, prediction[part]))
            except Exception as error:
                job.fail(error)
            if piece.asked.whole and shallow is not None and job.plan.request.cache_interval > 1:
                job.deep.put(piece.rows, {name: outputs[name][part] for name in shallow.features})

    def _run(self, component: str, pieces: list[Piece]) -> dict[str, NDArray[Any]]:
        jobs = _jobs_of(pieces)
        lead, width = jobs[0], sum(piece.width for piece in pieces)
        key = component, width, len(jobs) > 1, *map(id, profiles_of(jobs))
        if key not in lead.runners:
            lead.runners[key] = RowRunner(sessions_of(jobs, self._sessions)[component], width)
        runner = lead.runners[key]
        feeds = [self._feeds(piece, runner) for piece in pieces]
        if len(feeds) == 1:
            return runner.run(feeds[0])
        return runner.run({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})

    def _feeds(self, piece: Piece, runner: RowRunner) -> dict[str, NDArray[Any]]:
        """The rows of one job: (n, ...) each."""
        asked, role = piece.asked, self._roles.denoiser
        sample = asked.sample if len(piece.rows) == len(asked.sample) else asked.sample[list(piece.rows)]
        if asked.guided:
            sample = np.concatenate([sample, sample])
        feeds = {role.sample: sample, role.timestep: np.full(len(sample), asked.timestep, np.float32),
                 **asked.job.conditions(asked.guided, piece.rows, self._roles.conditioner.context, runner.cast,
                                        self._order)}
        if not asked.whole and role.shallow is not None:
            feeds.update(asked.job.deep.get(piece.rows))
        return feeds

    def _combined(self, piece: Piece, prediction: Float32) -> Float32:
        """One prediction for each image: (n, C, h, w) float32."""
        if not piece.asked.guided:
            return prediction
        half = len(prediction) // 2
        branches = prediction[:half], prediction[half:]
        uncond, cond = (branches[self._order.index(i)] for i in (0, 1))
        return piece.asked.job.plan.guidance.combine(uncond, cond)


def _jobs_of(pieces: Sequence[Piece]) -> list[Job]:
    return list(dict.fromkeys(piece.asked.job for piece in pieces))


def _together(images: Sequence[tuple[Asked, int]]) -> list[Piece]:
    """Images of a call, job by job."""
    rows: dict[int, tuple[Asked, list[int]]] = {}
    for asked, row in images:
        rows.setdefault(id(asked), (asked, []))[1].append(row)
    return [Piece(asked, tuple(of)) for asked, of in rows.values()]
