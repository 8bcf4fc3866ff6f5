"""Prompt to image: the sampling loop, written once over any sessions. Networks, sampling methods and files are others'.

    tokenize -> encode -> [add noise to an encoded image] -> denoise [and put back what a mask keeps] -> decode
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Event
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import decode
from runtimes.denoising import OnStep, Step, denoise
from runtimes.errors import BundleError, InputError
from runtimes.guidance import SHALLOW, Guidance, GuidedUnet
from runtimes.images import ImageLike, to_pil
from runtimes.manifest import PipelineFacts
from runtimes.noise import NoiseStreams
from runtimes.preview import Colours, fit
from runtimes.profile import Profile
from runtimes.prompt_cache import CacheStats, PromptCache
from runtimes.prompts import Embedder, PromptStyle, Tokenize
from runtimes.request import OUTPUTS, Request, check_request, finite, interval, whole
from runtimes.schedulers import Run, Scheduler, from_config
from runtimes.session import Session
from runtimes.start import begin

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
        tokenizer: Tokenize, *, cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Assemble a pipeline over any sessions; `runtimes.load` does it for a bundle.

        Args:
            sessions: looked up when used, so a mapping may load them late.
            facts: what the loop must know besides the networks.
            scheduler_config: as scheduler_config.json holds it.
            tokenizer: prompts -> (B, tokens) int64.
            cache_bytes: bound of the cache of embedded prompts.
        """
        self.sessions, self.facts = sessions, facts
        self._config, self._tokenize = dict(scheduler_config), tokenizer
        self._cache = PromptCache(cache_bytes)
        self._schedulers: dict[str | None, Scheduler] = {}
        self._colours: Colours | None = None

    @property
    def cache_stats(self) -> CacheStats:
        """Hits and size of the cache of embedded prompts."""
        return self._cache.stats

    def __call__(
        self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] = "", steps: int = 25,
        guidance_scale: float = 7.5, seed: int | Sequence[int] | None = None, images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, scheduler: str | None = None, eta: float = 0.0,
        guidance_rescale: float = 0.0, guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: ImageLike | Sequence[ImageLike] | None = None, mask: ImageLike | Sequence[ImageLike] | None = None,
        strength: float | None = None, weighting: bool = False, long_prompts: bool = False,
        cache_interval: int = 1, latents: Float32 | None = None, output: str = "pil", on_step: OnStep | None = None,
        cancel: Event | None = None, profile: Profile | None = None,
    ) -> Any:
        """Make images.

        Args:
            prompt: one text or several.
            negative_prompt: what to steer away from: one text, or one per prompt. Unused without guidance.
            steps: denoising steps.
            guidance_scale: how strongly to follow the prompt; at 1 and below guidance is off and a step costs half.
            seed: of the first image, the others counting on from it; or one per image; None is unpredictable.
            images_per_prompt: images for each prompt, which follow each other in the result.
            height, width: pixels; by default the latents' or the initial image's, else the model's own size.
            scheduler: name of a sampling method; by default the bundle's.
            eta: share of fresh noise in DDIM's steps.
            guidance_rescale: share of rescaling against overexposure, 0 to 1; see `guidance.Guidance`.
            guidance_interval: first and last share of the steps under guidance; a step outside costs half.
            image: initial image, or one per prompt: a path, a Pillow image or an array; resized to height and width.
            mask: white where the image is painted anew, black where it is kept; one, or one per prompt. It has the
                image's shape and may have another size.
            strength: share of the steps that an initial image goes through, above 0 and at most 1. By default 0.8, and
                1 under a mask, where it starts from noise alone.
            weighting: read `(word:1.3)`, `(word)` and `[word]` as weights; see `runtimes.weighting`.
            long_prompts: read prompts that are too long for the text encoder in windows, instead of cutting them. The
                U-Net must take that many tokens: build with --shapes sequence=...
            cache_interval: compute the U-Net's deep layers at every so many steps only, and reuse them between; needs a
                bundle built with --step-cache. 1 is every step; 3 is more than twice as fast.
            latents: (B, C, H/f, W/f) float32 of unit variance, used instead of the seeds' initial noise.
            output: "pil"; "numpy" for pixels in 0..1; "latents" for what would be decoded.
            on_step: called after every step; False ends the call with CancelledError, and so does what it raises.
            cancel: ends the call with CancelledError at the next step once another thread sets it.
            profile: records where the time goes.

        Returns:
            list of B PIL images, or (B, H, W, 3) float32, or (B, C, H/f, W/f) float32.

        Raises:
            InputError: an argument cannot be used; said before any network runs.
            CancelledError: on_step or cancel ended the call.
            ParityError: the networks' numbers are not finite.
            UnavailableError: out of memory.
        """
        start = perf_counter()
        if output not in OUTPUTS:
            raise InputError(f"unknown output {output!r}", where="output", fix=f"one of {', '.join(OUTPUTS)}")
        sessions = _Sessions(self.sessions, profile)
        if whole(cache_interval, "cache_interval") > 1 and SHALLOW not in self.sessions:
            raise InputError("this bundle has no U-Net that reuses deep features", where="cache_interval",
                             fix="leave it 1, or build with --step-cache")
        guidance = Guidance(finite(guidance_scale, "guidance_scale"), finite(guidance_rescale, "guidance_rescale"),
                            interval(guidance_interval))
        share = (0.8 if mask is None else 1.0) if strength is None else finite(strength, "strength")
        run = self._scheduler(scheduler).start(
            whole(steps, "steps"), 1.0 if image is None else share, finite(eta, "eta"))
        request = check_request(
            sessions, self.facts, prompt=prompt, negative_prompt=negative_prompt, images_per_prompt=images_per_prompt,
            guided=guidance.scale > 1, seed=seed, height=height, width=width, image=image, mask=mask, strength=share,
            latents=latents)
        style = PromptStyle(weighting, long_prompts)
        with np.errstate(over="ignore", invalid="ignore"):  # every result is checked to be finite
            result = self._generate(sessions, request, run, guidance, style, cache_interval, output, on_step, cancel)
        if profile is not None:
            profile.total_seconds += perf_counter() - start
        return result

    def _generate(
        self, sessions: Mapping[str, Session], request: Request, run: Run, guidance: Guidance, style: PromptStyle,
        cache_interval: int, output: str, on_step: OnStep | None, cancel: Event | None,
    ) -> Any:
        embedder = Embedder(self._tokenize, sessions["text_encoder"], self._cache, style)
        cond, uncond = embedder.pair(request.prompts, request.negatives)
        noise = NoiseStreams(request.seeds)
        start = begin(sessions, self.facts.scaling_factor, request, run, noise)
        predict = GuidedUnet(sessions["unet"], cond, uncond, guidance, len(run.timesteps), extra=start.extra,
                             shallow=sessions[SHALLOW] if cache_interval > 1 else None, cache_interval=cache_interval)
        sample = denoise(predict, run, start, noise, on_step, cancel)
        if output == "latents":
            return sample
        decoder, factor = sessions["vae_decoder"], self.facts.scaling_factor
        if output == "numpy":
            return decode.decode(decoder, sample, factor)
        return to_pil(decode.decode_uint8(decoder, sample, factor))

    def preview(self, latents: Float32) -> NDArray[np.uint8]:
        """A small picture of latents, for `Step.estimate`: one pixel for each latent, without the decoder.

        The linear map from latents to colours is fitted to the bundle's own decoder at the first call, once.

        Args:
            latents: (B, C, H/f, W/f) float32.

        Returns:
            (B, H/f, W/f, 3) uint8.
        """
        if self._colours is None:
            self._colours = fit(self.sessions["vae_decoder"], self.facts)
        return self._colours.show(latents)

    def _scheduler(self, name: str | None) -> Scheduler:
        if name not in self._schedulers:
            self._schedulers[name] = from_config(self._config, name)
        return self._schedulers[name]


class _Sessions(Mapping[str, Session]):
    """The sessions of one call: watched if there is a profile, with a clear error for one that is missing."""

    def __init__(self, sessions: Mapping[str, Session], profile: Profile | None) -> None:
        self._sessions, self._profile = sessions, profile

    def __getitem__(self, name: str) -> Session:
        try:
            session = self._sessions[name]
        except KeyError:
            raise BundleError(f"this pipeline has no {name}", where=name,
                              fix=f"it has {', '.join(sorted(self._sessions))}") from None
        return session if self._profile is None else self._profile.watch(session)

    def __iter__(self) -> Any:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)
