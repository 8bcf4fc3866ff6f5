"""`Pipeline`: requests become jobs, jobs are advanced together, latents become images. It runs no network itself.

    prepare: tokenize -> encode prompts and images -> add noise; advance: denoise by one step; finish: decode
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.session import Session
from runtimes.backends.time_profile import Profile
from runtimes.bundle.roles import ModeFacts, Roles
from runtimes.codec.preview import Colours, fit
from runtimes.codec.safety_checker import Preprocessing, flags
from runtimes.errors import InputError
from runtimes.inputs.noise import NoiseStreams
from runtimes.inputs.request import Request, described
from runtimes.inputs.request_fields import SizeConditions
from runtimes.inputs.resolved_request import Resolved, resolve, size_for
from runtimes.pipeline.base_and_refiner import begin_part
from runtimes.pipeline.batch_facts import BatchFacts
from runtimes.pipeline.conditioner import Conditioner
from runtimes.pipeline.decoding import decode_jobs
from runtimes.pipeline.denoiser import DenoiserCalls
from runtimes.pipeline.guidance import Guidance
from runtimes.pipeline.initial_latents import Pixels, Start, begin, encode_all, inpaints, to_encode
from runtimes.pipeline.job import Job, OnStep, Plan, Step, Stop
from runtimes.pipeline.memory_budget import MemoryBudget
from runtimes.pipeline.watched_sessions import WatchedSessions
from runtimes.schedulers import Scheduler, from_config
from runtimes.text.prompt_cache import CacheStats, PromptCache
from runtimes.text.prompt_encoder import PromptStyle, Tokenize

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = ["Job", "Pipeline", "Step"]
Float32 = NDArray[np.float32]
CACHE_BYTES = 64 << 20


class Pipeline:
    """Text to image, image to image and inpainting. Threads may share one: a call keeps nothing but embedded prompts.

    Attributes:
        sessions: the networks by name.
        roles: what each of them does, and sizes and factors of the model.
    """

    def __init__(
        self, sessions: Mapping[str, Session], roles: Roles, scheduler_config: Mapping[str, Any],
        *tokenizers: Tokenize, cache_bytes: int = CACHE_BYTES, preprocessing: Preprocessing | None = None,
        memory: MemoryBudget | None = None, batches: BatchFacts | None = None,
    ) -> None:
        """Assemble a pipeline over any sessions; `runtimes.load` does it for a bundle.

        Args:
            sessions: looked up when used, so a mapping may load them late.
            roles: what the loop must know besides the networks.
            scheduler_config: as scheduler_config.json holds it.
            tokenizers: prompts -> (B, tokens) int64, one for each text encoder.
            cache_bytes: bound of the cache of embedded prompts.
            preprocessing: what the safety checker's images go through, where the sessions hold one.
            memory: how many images share a call; as many as the networks take if None.
            batches: whether a row's numbers depend on its company; unknown if None.
        """
        self._batches = batches or BatchFacts()
        self.sessions, self.roles, self._loaded = self._batches.sessions(sessions), roles, sessions
        self._config = dict(scheduler_config)
        self._cache, self._preprocessing, self._memory = PromptCache(cache_bytes), preprocessing, memory
        self._conditioner = Conditioner(roles, tokenizers, self._cache)
        self._denoiser = DenoiserCalls(self.sessions, roles, memory, self._batches.shares)
        self._schedulers: dict[tuple[str | None, str], Scheduler] = {}
        self._colours: Colours | None = None

    @property
    def cache_stats(self) -> CacheStats:
        """Hits and size of the cache of embedded prompts."""
        return self._cache.stats

    def __call__(
        self, prompt: str | Sequence[str] | Request = "", *, on_step: OnStep | None = None, cancel: Event | None = None,
        profile: Profile | None = None, **fields: Any,
    ) -> Any:
        """Make images: `prepare`, `advance` until done, `finish`.

        Args:
            prompt: of the request, or a whole request, which no other field may go with.
            on_step: called after every step; False ends the call with CancelledError, and so does what it raises.
            cancel: once another thread sets it, the call ends with CancelledError when its network in flight returns.
            profile: records where the time goes.
            fields: of `runtimes.Request`, see below.

        Returns:
            list of B PIL images, or (B, H, W, 3) float32, or (B, C, H/f, W/f) float32.

        Raises:
            InputError: a field cannot be used; said before any network runs.
            CancelledError: on_step or cancel ended the call.
            ParityError: the networks' numbers are not finite.
            UnavailableError: out of memory.

        Fields of the request:
        """
        if isinstance(prompt, Request) and fields:
            raise InputError("fields beside a whole request", where=next(iter(fields)),
                             fix="put them into the request: dataclasses.replace(request, ...)")
        request = prompt if isinstance(prompt, Request) else Request(prompt, **fields)
        [job] = self.prepare([request], on_step=on_step, cancel=cancel, profile=profile)
        while not job.done:
            self.advance([job])
        [images] = self.finish([job])
        if job.error is not None:
            raise job.error
        return images

    def prepare(
        self, requests: Sequence[Request], *, on_step: OnStep | None = None, cancel: Event | None = None,
        profile: Profile | None = None,
    ) -> list[Job]:
        """Requests as jobs: prompts and images encoded, seeds and defaults found, nothing denoised.

        What requests need encoded shares calls where the numbers cannot depend on the company.

        Args:
            requests: all are checked before any network runs.
            on_step: called after every step of each job; False ends the job with CancelledError, as does what it
                raises. It does not end other jobs.
            cancel: once another thread sets it, all of these jobs end; `Job.cancel` ends one.
            profile: records where the time of these jobs goes.

        Raises:
            InputError: a request cannot be used.
            CancelledError: `cancel` was set.
            UnavailableError: out of memory.
        """
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step is {type(on_step).__name__}, expected a function of a Step", where="on_step")
        one_of(cancel, Event, "cancel"), one_of(profile, Profile, "profile")
        with _timed([profile]), _unchecked():
            plans = [self._plan(request, on_step, cancel, profile) for request in requests]
            if not plans:
                return []
            shared = plans[0].sessions if len(plans) == 1 or cancel is not None else WatchedSessions(
                self.sessions, None, *_given(profile))
            styled = [(_style(plan.request), plan.wanted) for plan in plans]
            if len(plans) > 1:
                for component in filter(self._batches.exact, self.roles.encoders):
                    self._conditioner.encode_together(component, shared, styled)
            conditions = [self._conditioner.gather(plan.sessions, style, wanted, plan.request.sizes or SizeConditions())
                          for plan, (style, wanted) in zip(plans, styled, strict=True)]
            noises = [NoiseStreams(plan.wanted.seeds) for plan in plans]
            starts = self._starts(plans, noises, shared)
            return [Job(*parts) for parts in zip(plans, conditions, starts, noises, strict=True)]

    def advance(self, jobs: Iterable[Job]) -> None:
        """One evaluation of the denoiser for each job that is not done; their rows share calls as far as they fit.

        Jobs may differ in prompt, steps, scheduler, guidance, seeds and progress. A fault of one (numbers that are not
        finite, what on_step raises, a cancel) is its `error` and leaves the others alone. Two threads must not advance
        the same job.

        Args:
            jobs: of this pipeline's `prepare`.
        """
        live = [job for job in dict.fromkeys(jobs) if not job.done and job.live()]
        with _timed(job.plan.profile for job in live), _unchecked():
            for asked in self._denoiser.evaluate(live):
                job, prediction = asked.job, asked.prediction
                try:
                    if asked.answered and prediction is not None and job.error is None:
                        job.answer(prediction, self.roles.denoiser.component)
                except Exception as error:
                    job.fail(error)

    def finish(self, jobs: Sequence[Job]) -> list[Any]:
        """The images of jobs that are done, decoded together.

        Args:
            jobs: of this pipeline's `prepare`.

        Returns:
            for each job what its request wants: a list of B PIL images, (B, H, W, 3) float32 in 0..1, or the latents
            (B, C, H/f, W/f) float32; an empty list for a job that has an `error`.

        Raises:
            InputError: a job is not done.
        """
        if any(not job.done for job in jobs):
            raise InputError("a job is not done", where="finish", fix="advance it until job.done")
        with _timed(job.plan.profile for job in jobs), _unchecked():
            return decode_jobs(self.sessions, self.roles.codec, jobs, self._memory, self._batches.shares)

    def _plan(self, request: Request, on_step: OnStep | None, cancel: Event | None, profile: Profile | None,
              ) -> Plan:
        """A request checked against this bundle, without running any network."""
        if request.cache_interval > 1 and self.roles.denoiser.shallow is None:
            raise InputError("this bundle has no denoiser that reuses deep features", where="cache_interval",
                             fix="leave it 1, or build with --step-cache")
        mode = self.roles.mode(request.image is not None, request.mask is not None)
        scale = mode.guidance_scale if request.guidance_scale is None else request.guidance_scale
        role = self.roles.guidance
        guidance = Guidance(1.0 if role.combination == "none" else scale, request.guidance_rescale,
                            request.guidance_interval, role.guides_below_one)
        strength = mode.strength if request.strength is None else request.strength
        run, total = begin_part(self._scheduler(request.scheduler, mode), request.steps, request.part,
                                1.0 if request.image is None else strength, request.eta)
        stop = Stop(cancel or Event(), total)
        sessions = WatchedSessions(
            self.sessions, None if cancel is None and request.tile is None else stop.check, *_given(profile))
        wanted = resolve(sessions, self.roles, request, guided=guidance.on, strength=strength)
        return Plan(request, wanted, run, total, guidance, self._images_at_once(wanted), stop, on_step, profile,
                    sessions)

    def _starts(self, plans: list[Plan], noises: list[NoiseStreams], shared: Mapping[str, Session]) -> list[Start]:
        """Where each job begins; what the images of all of them need encoded is encoded first."""
        codec, denoiser = self.roles.codec, self.roles.denoiser.component
        pixels = [Pixels() if plan.request.part[0] > 0 else to_encode(
            plan.wanted, inpaints(plan.sessions[denoiser], self.roles)) for plan in plans]
        wanted = [(array, plan.wanted.tiling) for plan, one in zip(plans, pixels, strict=True)
                  for array in (one.original, one.masked) if array is not None]
        encoder = codec.encoder.component
        encoded = iter(encode_all(shared[encoder], codec, wanted,
                                  together=self._batches.exact(encoder)) if wanted else [])
        starts = []
        for plan, one, noise in zip(plans, pixels, noises, strict=True):
            original, masked = (None if array is None else next(encoded) for array in (one.original, one.masked))
            if plan.request.part[0] > 0 and plan.wanted.latents is not None:
                starts.append(Start(plan.wanted.latents))
            else:
                starts.append(begin(self.roles, plan.wanted, plan.run, noise, original, masked))
        return starts

    def _images_at_once(self, wanted: Resolved) -> int | None:
        if wanted.tiling is not None:
            area, count = wanted.tiling.area, 1
        else:
            area, count = wanted.latent_shape[1] * wanted.latent_shape[2], len(wanted.seeds)
        if self._memory is None:
            return None if wanted.tiling is None else 1
        return self._memory.images_at_once(count, 2 if wanted.negatives else 1, area,
                                           len(wanted.seeds) * wanted.height * wanted.width)

    def size_of(self, aspect: float) -> tuple[int, int]:
        """Height and width in pixels nearest to an aspect ratio, at about the pixels of the model's own size.

        Args:
            aspect: width over height.
        """
        return size_for(self.roles, self.sessions, aspect)

    def preview(self, latents: Float32) -> NDArray[np.uint8]:
        """A small image of latents, for `Step.estimate`: one pixel for each latent, without the decoder.

        The linear map from latents to colours is fitted to the bundle's own decoder at the first call, once.

        Args:
            latents: (B, C, H/f, W/f) float32.

        Returns:
            (B, H/f, W/f, 3) uint8.
        """
        if self._colours is None:
            self._colours = fit(self.sessions[self.roles.codec.decoder.component], self.roles.codec)
        return self._colours.show(latents)

    @property
    def judges(self) -> bool:
        """Whether the bundle has a safety checker, which `flagged` asks."""
        return self._preprocessing is not None and self.roles.safety_checker in self.sessions

    def flagged(self, images: Sequence[Image]) -> list[bool]:
        """Which images the model's own safety checker flags. It runs here only, and changes nothing.

        Args:
            images: B Pillow images of any size.

        Raises:
            InputError: the bundle has no safety checker.
        """
        if self._preprocessing is None or not self.judges:
            raise InputError("this bundle has no safety checker", where="safety_checker",
                             fix="build --safety-checker, from a model that has one")
        return flags(self.sessions[self.roles.safety_checker], self._preprocessing(images)) if images else []

    def close(self) -> None:
        """Give back the memory of a loaded bundle's networks; running again loads them again."""
        close = getattr(self._loaded, "close", None)
        if close is not None:
            close()

    def _scheduler(self, name: str | None, mode: ModeFacts) -> Scheduler:
        key = name, mode.pipeline_class
        if key not in self._schedulers:
            self._schedulers[key] = from_config({**self._config, **mode.scheduler}, name)
        return self._schedulers[key]


def _style(request: Request) -> PromptStyle:
    return PromptStyle(request.weighting, request.long_prompts)


def _unchecked() -> np.errstate:
    """No warnings of numbers that are not finite: every result is checked to be."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _given(profile: Profile | None) -> list[Profile]:
    return [] if profile is None else [profile]


@contextmanager
def _timed(profiles: Iterable[Profile | None]) -> Iterator[None]:
    """Add the time of a block to profiles."""
    distinct = {id(profile): profile for profile in profiles if profile is not None}
    start = perf_counter()
    try:
        yield
    finally:
        for profile in distinct.values():
            profile.total_seconds += perf_counter() - start


def one_of(value: Any, kind: type[Any], where: str) -> Any:
    """A value of a type of ours, or None.

    Raises:
        InputError: anything else.
    """
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{where} is {type(value).__name__}, expected {kind.__name__}", where=where)
    return value


def _with_keywords(call: Any) -> None:
    """Show the fields of a request as keywords of a function that passes them on, in its signature and docstring."""
    signature = inspect.signature(call)
    first, prompt, *rest = signature.parameters.values()
    keywords = [inspect.Parameter(declared.name, inspect.Parameter.KEYWORD_ONLY, default=declared.default,
                                  annotation=declared.type) for declared in dataclasses.fields(Request)[1:]]
    call.__signature__ = signature.replace(parameters=[first, prompt, *keywords, *rest[:-1]])
    call.__doc__ = f"{inspect.cleandoc(call.__doc__)}\n{described(4)}"


_with_keywords(Pipeline.__call__)
