"""Prompt to image: the sampling loop, written once over any sessions. Networks, sampling methods and files are others'.

    tokenize -> encode -> [add noise to an encoded image] -> denoise [and put back what a mask keeps] -> decode
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.profile import Profile
from runtimes.backends.session import Session
from runtimes.bundle.manifest import DEFAULT_STEPS, PipelineFacts
from runtimes.bundle.roles import ModeFacts
from runtimes.codec import autoencoder
from runtimes.codec.pixels import ImageLike, to_pil
from runtimes.codec.preview import Colours, fit
from runtimes.codec.safety_checker import SAFETY_CHECKER, Preprocessing, flags
from runtimes.codec.tiling import Tiled, Tiling
from runtimes.errors import BundleError, InputError
from runtimes.pipeline.aspect_ratios import nearest_size
from runtimes.pipeline.base_and_refiner import WHOLE, begin_part
from runtimes.pipeline.conditioner import Conditions, SizeConditions, gather
from runtimes.pipeline.denoising import OnStep, Step, Stop, denoise
from runtimes.pipeline.guidance import SHALLOW, Guidance, GuidedUnet
from runtimes.pipeline.initial_latents import Start, begin
from runtimes.pipeline.memory_budget import MemoryBudget
from runtimes.pipeline.noise import NoiseStreams
from runtimes.pipeline.request import (
    OUTPUTS,
    Request,
    check_request,
    finite,
    flag,
    interval,
    one_of,
    pixel_limits,
    whole,
)
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
        self, prompt: str | Sequence[str] = "", *, negative_prompt: str | Sequence[str] | None = None,
        steps: int = DEFAULT_STEPS, guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None, images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, scheduler: str | None = None, eta: float = 0.0,
        guidance_rescale: float = 0.0, guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: ImageLike | Sequence[ImageLike] | None = None, mask: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None, weighting: bool = False, long_prompts: bool = False,
        cache_interval: int = 1, tile: int | None = None, latents: Float32 | None = None, output: str = "pil",
        on_step: OnStep | None = None, cancel: Event | None = None, profile: Profile | None = None,
        part: tuple[float, float] = WHOLE, sizes: SizeConditions | None = None,
    ) -> Any:
        """Make images.

        Args:
            prompt: one text or several; empty texts for a model without prompts.
            negative_prompt: what to steer away from: one text, or one per prompt. Unused without guidance. None is
                what the model was trained to have in its place: zeros for Stable Diffusion XL, else the empty text.
            steps: denoising steps.
            guidance_scale: how strongly to follow the prompt; at 1 and below guidance is off and a step costs half. By
                default what diffusers' class for the mode says: 7.5 for Stable Diffusion, 5 for XL.
            seed: of the first image, the others counting on from it; or one per image; None is unpredictable. The noise
                is that of `torch.Generator("cpu").manual_seed(seed)`, bit for bit: diffusers makes the same image with
                it, and the same images with a list of them.
            images_per_prompt: images for each prompt, which follow each other in the result.
            height, width: pixels; by default the latents', else the initial image's rounded down to whole latents, else
                (and under a mask) the model's own size.
            scheduler: name of a sampling method, over the model's noise schedule; by default the model's own.
            eta: share of fresh noise in DDIM's steps.
            guidance_rescale: share of rescaling against overexposure, 0 to 1; see `guidance.Guidance`.
            guidance_interval: first and last share of the steps under guidance; a step outside costs half.
            image: initial image, or several that are dealt out in turn: paths, Pillow images of mode RGB, or float
                arrays (H, W, 3) or (K, H, W, 3) in 0..1; resized to height and width. See `runtimes.codec.pixels`.
            mask: white where the image is painted anew, black where it stays; one, or several that are dealt out in
                turn: paths, Pillow images, or arrays (H, W) or (K, H, W), 1 from 0.5 on; resized to height and width.
            strength: share of the steps that an initial image goes through, above 0 and at most 1. By default what
                diffusers' class for the mode says: 0.8 for Stable Diffusion, 0.3 for XL; under a mask 1, where it
                starts from noise alone, and 0.9999 for XL.
            weighting: read `(word:1.3)`, `(word)` and `[word]` as weights; see `runtimes.text.prompt_weighting`.
            long_prompts: read prompts that are too long for the text encoder in windows, instead of cutting them. The
                U-Net must take that many tokens: build with --shapes sequence=...
            cache_interval: compute the U-Net's deep layers at every so many steps only, and reuse them between; needs a
                bundle built with --step-cache. 1 is every step; 3 is more than twice as fast.
            tile: generate in overlapping tiles of so many pixels a side, one at a time, so that height and width may go
                beyond what the bundle was built for, within the memory of one tile; see `runtimes.codec.tiling`.
            latents: (B, C, H/f, W/f) float32 of unit variance, used instead of the seeds' initial noise; under a mask,
                denoising starts from them alone, whatever the strength.
            output: "pil"; "numpy" for pixels in 0..1; "latents" for what would be decoded.
            on_step: called after every step; False ends the call with CancelledError, and so does what it raises.
            cancel: once another thread sets it, the call ends with CancelledError when its network in flight returns.
            profile: records where the time goes.
            part: share of the noise schedule to denoise: (0, 0.8) with output="latents" by a base model, then (0.8, 1)
                with those latents by a refiner. A part that does not begin at 0 starts from `latents` as they are.
            sizes: what Stable Diffusion XL is told about sizes; by default, that the image is whole.

        Returns:
            list of B PIL images, or (B, H, W, 3) float32, or (B, C, H/f, W/f) float32.

        Raises:
            InputError: an argument cannot be used; said before any network runs.
            CancelledError: on_step or cancel ended the call.
            ParityError: the networks' numbers are not finite.
            UnavailableError: out of memory.
        """
        start = perf_counter()
        part = interval(part, "part")
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step is {type(on_step).__name__}, expected a function of a Step", where="on_step")
        one_of(cancel, Event, "cancel"), one_of(profile, Profile, "profile"), one_of(sizes, SizeConditions, "sizes")
        if one_of(output, str, "output") not in OUTPUTS:
            raise InputError(f"unknown output {output!r}", where="output", fix=f"one of {', '.join(OUTPUTS)}")
        if whole(cache_interval, "cache_interval") > 1 and SHALLOW not in self.sessions:
            raise InputError("this bundle has no U-Net that reuses deep features", where="cache_interval",
                             fix="leave it 1, or build with --step-cache")
        mode = self.facts.mode(image is not None, mask is not None)
        scale = mode.guidance_scale if guidance_scale is None else finite(guidance_scale, "guidance_scale")
        guidance = Guidance(scale, finite(guidance_rescale, "guidance_rescale"),
                            interval(guidance_interval, "guidance_interval"), self.facts.guides_below_one)
        share = mode.strength if strength is None else finite(strength, "strength")
        method, wanted = self._scheduler(one_of(scheduler, str, "scheduler"), mode), whole(steps, "steps")
        run, count = begin_part(method, wanted, part, 1.0 if image is None else share,
                                finite(eta, "eta"))
        stop = Stop(cancel, count)
        sessions = _Sessions(self.sessions, stop, profile)
        if part[0] > 0 and (latents is None or image is not None):
            raise InputError("a part that begins later starts from latents and no image", where="part",
                             fix='give the latents of the part before: output="latents"')
        request = check_request(
            sessions, self.facts, prompt=prompt, negative_prompt=negative_prompt, images_per_prompt=images_per_prompt,
            guided=guidance.on, seed=seed, height=height, width=width, image=image, mask=mask, strength=share,
            latents=latents, tile=tile)
        at_once = self._images_at_once(request)
        style = PromptStyle(flag(weighting, "weighting"), flag(long_prompts, "long_prompts"))
        with np.errstate(over="ignore", invalid="ignore"):  # every result is checked to be finite
            conditions = gather(sessions, self.facts, self._tokenizers, self._cache, style, request,
                                sizes or SizeConditions())
            noise = NoiseStreams(request.seeds)
            if part[0] > 0 and request.latents is not None:
                begun = Start(request.latents)
            else:
                begun = begin(sessions, self.facts, request, run, noise)
            predict = self._predictor(sessions, request, conditions, guidance, count, begun.extra, cache_interval,
                                      at_once)
            sample = denoise(predict, run, begun, noise, stop, on_step, count=count)
            stop.check()
            result = self._finished(sessions, sample, request.tiling, output, at_once)
        if profile is not None:
            profile.total_seconds += perf_counter() - start
        return result

    def _predictor(
        self, sessions: Mapping[str, Session], request: Request, conditions: Conditions, guidance: Guidance,
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

    def _images_at_once(self, request: Request) -> int | None:
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
        sides = [pixel_limits(self.facts, self.sessions, name) for name in ("height", "width")]
        return nearest_size(aspect, self.facts.height * self.facts.width, *sides)

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
