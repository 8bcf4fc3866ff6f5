"""`Job`, the state of one request from its first noise to clean latents; it calls no network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner, all_finite
from runtimes.backends.session import Session
from runtimes.backends.time_profile import Profile
from runtimes.codec.tiling import Tiling
from runtimes.errors import CancelledError, InputError, ParityError
from runtimes.inputs.noise import NoiseStreams
from runtimes.inputs.request import Request
from runtimes.inputs.resolved_request import Resolved
from runtimes.pipeline.conditioner import Conditions
from runtimes.pipeline.guidance import Guidance
from runtimes.pipeline.initial_latents import Start
from runtimes.pipeline.memory_budget import MemoryBudget
from runtimes.pipeline.watched_sessions import WatchedSessions
from runtimes.schedulers import Run

Float32 = NDArray[np.float32]
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What `on_step` is given after every denoising step.

    Attributes:
        index: 0 to total - 1.
        timestep: what the denoiser was fed.
        latents: (B, C, H/f, W/f) float32 after the step, read-only.
        total: number of steps of this job.
        estimate: what the latents will be when all noise is gone, as far as they tell; `Pipeline.preview` shows it.
    """

    index: int
    timestep: float
    latents: Float32
    total: int
    estimate: Float32


OnStep = Callable[[Step], bool | None]


class Stop:
    """Where a job is asked whether it should end: before every step and every call of a network.

    Attributes:
        taken: steps that are finished.
    """

    def __init__(self, cancelled: Event, total: int) -> None:
        """End a job of `total` steps once `cancelled` is set."""
        self.cancelled, self._total, self.taken = cancelled, total, 0

    def check(self) -> None:
        """Go on, or raise CancelledError."""
        if self.cancelled.is_set():
            raise CancelledError(self.taken, self._total)


@dataclass(frozen=True)
class Plan:
    """What is known of a job before any network runs.

    Attributes:
        request: as it was asked.
        wanted: for this bundle, spread to one entry for each of B images.
        run: of the scheduler.
        total: steps of it that belong to the request; a step is one evaluation of the denoiser.
        guidance: how the prompt is followed.
        at_once: at most so many images of it share a call; None where nothing limits them.
        stop: whether the job should end, and how far it is.
        on_step: called after every step.
        profile: where its time is recorded.
        sessions: the networks as they run for this job alone.
    """

    request: Request
    wanted: Resolved
    run: Run
    total: int
    guidance: Guidance
    at_once: int | None
    stop: Stop
    on_step: OnStep | None
    profile: Profile | None
    sessions: WatchedSessions


class Job:
    """One request under way. One thread at a time advances it; any may read its progress and cancel it.

    Attributes:
        error: why it ended before its time, or None.
        deep: features of the last whole step, for the denoiser's shallow entry.
        runners: calls of the denoiser as laid out for this job, by component and number of rows.
        calls, company: of the denoiser so far, and the images of all of them together, those of other jobs included;
            of a tiled job, tiles.
    """

    def __init__(self, plan: Plan, conditions: Conditions, start: Start, noise: NoiseStreams) -> None:
        """Stand before the first step.

        Args:
            plan: of the request.
            conditions: of each of the B images, each negative prompt as long as its prompt.
            start: the sample at the run's first noise level.
            noise: where steps that need fresh noise sample it.
        """
        self.plan = plan
        self.error: Exception | None = None
        self.deep = Features()
        self.runners: dict[Any, RowRunner] = {}
        self.calls, self.company = 0, 0
        tiling, self._start, self._noise = plan.wanted.tiling, start, noise
        self._tiles: Tiling | None = None
        self._sample, self._timesteps = start.sample, [float(t) for t in plan.run.timesteps][: plan.total]
        self._conditions = conditions if tiling is None else conditions.repeated(tiling.count)
        self._fed: dict[tuple[bool, Rows], dict[str, NDArray[Any]]] = {}
        self.rows_by_length = _by_length(self._conditions.cond)
        self._whole = self._plan_whole_steps()

    @property
    def index(self) -> int:
        """Steps that are finished."""
        return self.plan.stop.taken

    @property
    def total(self) -> int:
        """Steps of the job: more than `request.steps` for methods that ask the denoiser twice a step."""
        return self.plan.total

    @property
    def done(self) -> bool:
        """Whether nothing is left to denoise, for good or because of `error`."""
        return self.error is not None or self.index >= self.total

    @property
    def latents(self) -> Float32:
        """The latents as of now, (B, C, H/f, W/f) float32, read-only."""
        return _read_only(self._sample)

    @property
    def estimate(self) -> Float32:
        """What the latents will be when all noise is gone, as far as they tell: (B, C, H/f, W/f) float32, read-only.

        `Pipeline.preview` shows it.
        """
        return _read_only(self.plan.run.estimate(self._sample, self.index))

    def cancel(self) -> None:
        """End the job at its next step or call of a network; `error` is a CancelledError then."""
        self.plan.stop.cancelled.set()

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        if self.error is None:
            self.error = error

    def live(self) -> bool:
        """Whether the job goes on; one that was cancelled ends here."""
        if self.error is None and self.plan.stop.cancelled.is_set():
            self.fail(CancelledError(self.index, self.total))
        return self.error is None

    def whole_steps(self, i: int) -> int:
        """How many of the steps before i and of i itself compute all of the denoiser."""
        return sum(self._whole[: i + 1])

    # ---- one step, in two halves ---------------------------------------------------------------------------------

    def ask(self) -> Asked:
        """What the denoiser must say for the next step."""
        i, run, tiling = self.index, self.plan.run, self.plan.wanted.tiling
        sample = run.scale_model_input(self._sample, i)
        if self._start.extra is not None:
            sample = np.concatenate([sample, self._start.extra], axis=1)
        if tiling is not None:
            # Tiles stay where they were while deep features of an earlier step are reused.
            self._tiles = tiling.shifted(self.whole_steps(i))
            sample = self._tiles.stack(sample)
        if self._whole[i]:
            self.deep.clear()
        return Asked(self, sample, self._timesteps[i], self._guided(i), self._whole[i])

    def answer(self, prediction: Float32, denoiser: str) -> None:
        """Take the step.

        Args:
            prediction: for what `ask` gave, (rows, C, h, w) float32.
            denoiser: its name in errors.

        Raises:
            ParityError: the latents are not finite any more.
            CancelledError: on_step ended the job.
        """
        i, run = self.index, self.plan.run
        if self._tiles is not None:
            prediction = self._tiles.join(np.split(prediction, self._tiles.count))
        sample = self._sample
        fresh = self._noise.sample(sample.shape[1:]) if run.needs_noise(i) else None
        sample = run.step(prediction, i, sample, fresh)
        if self._start.repaint is not None:
            sample = self._start.repaint.put_back(sample, run, i)
        if not all_finite(sample):
            raise ParityError(f"the latents are not finite after step {i + 1} of {self.total}", where=denoiser,
                              fix="build the denoiser in a higher precision")
        self._sample, self.plan.stop.taken = sample, i + 1
        on_step = self.plan.on_step
        if on_step is not None and on_step(
                Step(i, self._timesteps[i], self.latents, self.total, self.estimate)) is False:
            raise CancelledError(i + 1, self.total)

    def conditions(self, guided: bool, rows: Rows, context: str, cast: Callable[[str, NDArray[Any]], NDArray[Any]],
                   order: tuple[int, int]) -> dict[str, NDArray[Any]]:
        """What the denoiser is fed about the prompts of some rows, the same at every step: (n, ...) by input.

        Args:
            guided: both branches, one after the other, or that of the prompt alone.
            rows: which.
            context: input of the embedded prompt; "" for none.
            cast: to the input's dtype.
            order: of the branches: 0 is the negative one.
        """
        key = guided, rows
        if key not in self._fed:
            if len(self._fed) > 2 * len(self._conditions.cond) + 8:  # other company cuts the rows otherwise
                self._fed.clear()
            known, picked = self._conditions, list(rows)
            branches = [(known.uncond, known.added_uncond), (known.cond, known.added)]
            used = [branches[i] for i in order] if guided else branches[1:]
            fed = {name: np.concatenate([added[name][picked] for _, added in used]) for name in known.added}
            if context:
                fed[context] = np.stack([hidden[row] for hidden, _ in used if hidden is not None for row in rows])
            self._fed[key] = {name: cast(name, values) for name, values in fed.items()}
        return self._fed[key]

    def _guided(self, i: int) -> bool:
        return self._conditions.uncond is not None and self.plan.guidance.active(i, self.total)

    def _plan_whole_steps(self) -> list[bool]:
        """For each step, whether it computes the deep features: every so many steps, and when guidance sets in or ends.

        Ma et al., DeepCache, arXiv 2312.00858, section 3.3 with the uniform 1:N strategy.
        """
        interval, ages = self.plan.request.cache_interval, list[int]()
        for i in range(self.total):
            goes_on = i > 0 and self._guided(i) == self._guided(i - 1)
            ages.append((ages[-1] + 1) % interval if goes_on else 0)
        return [age == 0 for age in ages]


def profiles_of(jobs: Iterable[Job]) -> list[Profile]:
    """The profiles in which the time of jobs is recorded, each once."""
    return list({id(profile): profile for job in jobs if (profile := job.plan.profile) is not None}.values())


def sessions_of(jobs: Sequence[Job], sessions: Mapping[str, Session]) -> Mapping[str, Session]:
    """The networks for a call of some jobs: a lone one's own, which end with it; shared ones end with nobody."""
    return jobs[0].plan.sessions if len(jobs) == 1 else WatchedSessions(sessions, None, *profiles_of(jobs))


def images_at_once(jobs: Sequence[Job], memory: MemoryBudget | None, count: int, copies: int) -> int | None:
    """How many images of a call of some jobs of one size memory allows; None where nothing limits them.

    Args:
        jobs: each of which fits alone.
        memory: the budget.
        count: images that are to be computed.
        copies: rows of each.
    """
    if len(jobs) == 1 or memory is None:
        return jobs[0].plan.at_once
    wanted = [job.plan.wanted for job in jobs]
    pixels = sum(len(one.seeds) * one.height * one.width for one in wanted)
    with suppress(InputError):
        _, rows, columns = wanted[0].latent_shape
        return memory.images_at_once(count, copies, rows * columns, pixels)
    return 1


class Asked:
    """What one step of a job asks of the denoiser, and what has been answered so far.

    Attributes:
        sample: (rows, C', h, w) float32; a row is an image, or a tile of one.
        timestep: of all rows.
        guided: whether every row is computed without the prompt, too.
        whole: whether all of the denoiser is computed.
        prediction: (rows, C, h, w) float32 once all rows are answered.
    """

    def __init__(self, job: Job, sample: Float32, timestep: float, guided: bool, whole: bool) -> None:
        """Ask for all rows of `sample`."""
        self.job, self.sample, self.timestep, self.guided, self.whole = job, sample, timestep, guided, whole
        self.prediction: Float32 | None = None
        self._left = len(sample)

    @property
    def answered(self) -> bool:
        """Whether no row is missing."""
        return self._left == 0

    def put(self, rows: Rows, prediction: Float32) -> None:
        """Take the prediction of some rows: (len(rows), C, h, w) float32, which is not copied if these are all."""
        self._left -= len(rows)
        if len(rows) == len(self.sample):
            self.prediction = prediction
            return
        if self.prediction is None:
            self.prediction = np.empty((len(self.sample), *prediction.shape[1:]), np.float32)
        self.prediction[list(rows)] = prediction


class Features:
    """Deep features of the rows of a job, as the denoiser's whole entry gave them, by name: (branches * n, ...).

    Every array has the shape and dtype that the denoiser's TensorSpec says, for these rows: features of any scale.
    """

    def __init__(self) -> None:
        self._stored: dict[Rows, dict[str, NDArray[Any]]] = {}

    def clear(self) -> None:
        """Forget those of an earlier step."""
        self._stored.clear()

    def put(self, rows: Rows, features: dict[str, NDArray[Any]]) -> None:
        """Remember the features of rows: (branches * len(rows), ...) each, branch by branch."""
        self._stored[rows] = features

    def get(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """The features of rows, which may have been computed in another company: (branches * len(rows), ...) each."""
        if rows in self._stored:
            return self._stored[rows]
        places = {row: (stored, i) for stored in self._stored for i, row in enumerate(stored)}
        first, known = next(iter(self._stored.items()))
        return {
            name: np.stack([self._stored[stored][name][branch * len(stored) + i]
                            for branch in range(len(array) // len(first))
                            for stored, i in (places[row] for row in rows)])
            for name, array in known.items()}


def _by_length(hidden: Iterable[Float32]) -> list[tuple[int, Rows]]:
    """Rows whose prompts are equally long, with that length: those of another cannot share their call."""
    found: dict[int, list[int]] = {}
    for row, tokens in enumerate(hidden):
        found.setdefault(len(tokens), []).append(row)
    return [(length, tuple(rows)) for length, rows in found.items()]


def _read_only(array: Float32) -> Float32:
    view = array.view()
    view.setflags(write=False)
    return view
