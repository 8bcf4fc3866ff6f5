"""Prompt to image: the sampling loop, written once over any sessions. Networks, sampling methods and files are others'.

    tokenize -> encode -> [add noise to an encoded image] -> denoise [and put back what a mask keeps] -> decode
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.profile import Profile
from runtimes.backends.session import Session
from runtimes.bundle.manifest import PipelineFacts
from runtimes.bundle.roles import ModeFacts
from runtimes.codec import autoencoder
from runtimes.codec.pixels import to_pil
from runtimes.codec.preview import Colours, fit
from runtimes.codec.safety_checker import SAFETY_CHECKER, Preprocessing, flags
from runtimes.codec.tiling import Tiled, Tiling
from runtimes.errors import BundleError, InputError
from runtimes.pipeline.base_and_refiner import begin_part
from runtimes.pipeline.conditioner import Conditions, gather
from runtimes.pipeline.denoising import OnStep, Step, Stop, denoise
from runtimes.pipeline.guidance import SHALLOW, Guidance, GuidedUnet
from runtimes.pipeline.initial_latents import Start, begin
from runtimes.pipeline.memory_budget import MemoryBudget
from runtimes.pipeline.noise import NoiseStreams
from runtimes.pipeline.request import Request, described
from runtimes.pipeline.request_fields import SizeConditions
from runtimes.pipeline.resolved import Resolved, resolve, size_for
from runtimes.schedulers import Scheduler, from_config
from runtimes.text.prompt_cache import CacheStats, PromptCache
from runtimes.text.prompt_encoder import PromptStyle, Tokenize

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = ["Pipeline", "Step"]
Float32 = NDArray[np.float32]
CACHE_BYTES = 64 << 20


class Pipeline:
    """Text to image, image to image and inpainting. Threads may share one: a call keeps nothing but embedded prompts.

    Attributes:
        sessions: the networks by name: text_encoder, unet, vae_decoder, and vae_encoder for image to image.
        facts: sizes and factors of the model.
    """

    def __init__(
        self, sessions: Mapping[str, Session], facts: PipelineFacts, scheduler_config: Mapping[str, Any],
        *tokenizers: Tokenize, cache_bytes: int = CACHE_BYTES, preprocessing: Preprocessing | None = None,
        memory: MemoryBudget | None = None,
    ) -> None:
        """Assemble a pipeline over any sessions; `runtimes.load` does it for a bundle.

        Args:
            sessions: looked up when used, so a mapping may load them late.
            facts: what the loop must know besides the networks.
            scheduler_config: as scheduler_config.json holds it.
            tokenizers: prompts -> (B, tokens) int64, one for each of `facts.text_encoders`.
            cache_bytes: bound of the cache of embedded prompts.
            preprocessing: what the safety checker's images go through, where the sessions hold one.
            memory: how many images share a call; as many as the networks take if None.
        """
        self.sessions, self.facts = sessions, facts
        self._config, self._tokenizers = dict(scheduler_config), tokenizers
        self._cache, self._preprocessing, self._memory = PromptCache(cache_bytes), preprocessing, memory
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
        """Make images.

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
        start = perf_counter()
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step is {type(on_step).__name__}, expected a function of a Step", where="on_step")
        one_of(cancel, Event, "cancel"), one_of(profile, Profile, "profile")
        if isinstance(prompt, Request) and fields:
            raise InputError("fields beside a whole request", where=next(iter(fields)),
                             fix="put them into the request: dataclasses.replace(request, ...)")
        asked = prompt if isinstance(prompt, Request) else Request(prompt, **fields)
        if asked.cache_interval > 1 and SHALLOW not in self.sessions:
            raise InputError("this bundle has no U-Net that reuses deep features", where="cache_interval",
                             fix="leave it 1, or build with --step-cache")
        mode = self.facts.mode(asked.image is not None, asked.mask is not None)
        scale = mode.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        guidance = Guidance(scale, asked.guidance_rescale, asked.guidance_interval, self.facts.guides_below_one)
        share = mode.strength if asked.strength is None else asked.strength
        method = self._scheduler(asked.scheduler, mode)
        run, count = begin_part(method, asked.steps, asked.part, 1.0 if asked.image is None else share, asked.eta)
        stop = Stop(cancel, count)
        sessions = _Sessions(self.sessions, stop, profile)
        request = resolve(sessions, self.facts, asked, guided=guidance.on, strength=share)
        at_once = self._images_at_once(request)
        style = PromptStyle(asked.weighting, asked.long_prompts)
        with np.errstate(over="ignore", invalid="ignore"):  # every result is checked to be finite
            conditions = gather(sessions, self.facts, self._tokenizers, self._cache, style, request,
                                asked.sizes or SizeConditions())
            noise = NoiseStreams(request.seeds)
            if asked.part[0] > 0 and request.latents is not None:
                begun = Start(request.latents)
            else:
                begun = begin(sessions, self.facts, request, run, noise)
            predict = self._predictor(sessions, request, conditions, guidance, count, begun.extra,
                                      asked.cache_interval, at_once)
            sample = denoise(predict, run, begun, noise, stop, on_step, count=count)
            stop.check()
            result = self._finished(sessions, sample, request.tiling, asked.output, at_once)
        if profile is not None:
            profile.total_seconds += perf_counter() - start
        return result

    def _predictor(
        self, sessions: Mapping[str, Session], request: Resolved, conditions: Conditions, guidance: Guidance,
        count: int, extra: Float32 | None, cache_interval: int, at_once: int | None,
    ) -> Callable[[Float32, float, int], Float32]:
        """The U-Net under the request's prompts, for the whole image or tile by tile."""
        tiling = request.tiling
        shallow = sessions[SHALLOW] if cache_interval > 1 else None
        if tiling is None:
            return GuidedUnet(sessions["unet"], conditions, guidance, count, extra=extra, shallow=shallow,
                              cache_interval=cache_interval, images_at_once=at_once)
        predict = GuidedUnet(sessions["unet"], conditions.repeated(tiling.count), guidance, count, shallow=shallow,
                             cache_interval=cache_interval, images_at_once=1)
        return Tiled(predict, tiling, predict.whole_steps, extra)

    def _finished(
        self, sessions: Mapping[str, Session], sample: Float32, tiling: Tiling | None, output: str, at_once: int | None,
    ) -> Any:
        """Denoised latents in the form that was asked for."""
        if output == "latents":
            return sample
        decoder = sessions["vae_decoder"]
        if tiling is not None:
            pixels = autoencoder.decode_tiled(decoder, sample, self.facts, tiling)
            return pixels if output == "numpy" else to_pil(autoencoder.to_uint8(pixels))
        if output == "numpy":
            return autoencoder.decode(decoder, sample, self.facts, at_once)
        return to_pil(autoencoder.decode_uint8(decoder, sample, self.facts, at_once))

    def _images_at_once(self, request: Resolved) -> int | None:
        if self._memory is None:
            return None
        _, rows, columns = request.latent_shape
        area = rows * columns if request.tiling is None else request.tiling.area
        count = len(request.seeds)
        return self._memory.images_at_once(count if request.tiling is None else 1, 2 if request.negatives else 1, area,
                                           count * request.height * request.width)

    def size_of(self, aspect: float) -> tuple[int, int]:
        """Height and width in pixels nearest to an aspect ratio, at about the pixels of the model's own size.

        Args:
            aspect: width over height.
        """
        return size_for(self.facts, self.sessions, aspect)

    def preview(self, latents: Float32) -> NDArray[np.uint8]:
        """A small image of latents, for `Step.estimate`: one pixel for each latent, without the decoder.

        The linear map from latents to colours is fitted to the bundle's own decoder at the first call, once.

        Args:
            latents: (B, C, H/f, W/f) float32.

        Returns:
            (B, H/f, W/f, 3) uint8.
        """
        if self._colours is None:
            self._colours = fit(self.sessions["vae_decoder"], self.facts)
        return self._colours.show(latents)

    def flagged(self, images: Sequence[Image]) -> list[bool]:
        """Which images the model's own safety checker flags. It runs here only, and changes nothing.

        Args:
            images: B Pillow images of any size.

        Raises:
            InputError: the bundle has no safety checker.
        """
        if self._preprocessing is None or SAFETY_CHECKER not in self.sessions:
            raise InputError("this bundle has no safety checker", where=SAFETY_CHECKER,
                             fix="build --safety-checker, from a model that has one")
        return flags(self.sessions[SAFETY_CHECKER], self._preprocessing(images)) if images else []

    def _scheduler(self, name: str | None, mode: ModeFacts) -> Scheduler:
        key = name, mode.pipeline_class
        if key not in self._schedulers:
            self._schedulers[key] = from_config({**self._config, **mode.scheduler}, name)
        return self._schedulers[key]


class _Sessions(Mapping[str, Session]):
    """The sessions of one call: they can be stopped, are timed for a profile, and one that is missing is named."""

    def __init__(self, sessions: Mapping[str, Session], stop: Stop, profile: Profile | None) -> None:
        self._sessions, self._stop, self._profile = sessions, stop, profile

    def __getitem__(self, name: str) -> Session:
        try:
            session = self._stop.watch(self._sessions[name])
        except KeyError:
            raise BundleError(f"this pipeline has no {name}", where=name,
                              fix=f"it has {', '.join(sorted(self._sessions))}") from None
        return session if self._profile is None else self._profile.watch(session)

    def __iter__(self) -> Any:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)


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
