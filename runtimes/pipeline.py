"""Prompt to image: the sampling loop, written once over any sessions. Networks, sampling methods and files are others'.

    tokenize -> encode -> [add noise to an encoded image] -> denoise -> decode
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import decode
from runtimes.batching import all_finite
from runtimes.errors import BundleError, InputError, ParityError
from runtimes.guidance import GuidedUnet
from runtimes.images import ImageLike, to_pil
from runtimes.manifest import PipelineFacts
from runtimes.noise import NoiseStreams
from runtimes.profile import Profile
from runtimes.prompt_cache import CacheStats, PromptCache
from runtimes.prompts import Tokenize, embed
from runtimes.request import OUTPUTS, Request, check_request, finite, whole
from runtimes.schedulers import Run, Scheduler, from_config
from runtimes.session import Session

Float32 = NDArray[np.float32]
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every denoising step.

    Attributes:
        index: 0 to total - 1.
        timestep: what the U-Net was told.
        latents: (B, C, H/f, W/f) float32 after the step, read-only.
        total: number of steps of this call.
    """

    index: int
    timestep: float
    latents: Float32
    total: int


class Pipeline:
    """Text to image and image to image. Threads may share one: a call keeps nothing but embedded prompts.

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

    @property
    def cache_stats(self) -> CacheStats:
        """Hits and size of the cache of embedded prompts."""
        return self._cache.stats

    def __call__(
        self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] = "", steps: int = 25,
        guidance_scale: float = 7.5, seed: int | Sequence[int] | None = None, images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, scheduler: str | None = None, eta: float = 0.0,
        image: ImageLike | Sequence[ImageLike] | None = None, strength: float = 0.8,
        latents: Float32 | None = None, output: str = "pil", on_step: Callable[[Step], None] | None = None,
        profile: Profile | None = None,
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
            image: initial image, or one per prompt: a path, a Pillow image or an array; resized to height and width.
            strength: share of the steps that an initial image goes through, above 0 and at most 1.
            latents: (B, C, H/f, W/f) float32 of unit variance, used instead of the seeds' initial noise.
            output: "pil"; "numpy" for pixels in 0..1; "latents" for what would be decoded.
            on_step: called after every step; what it raises ends the call.
            profile: records where the time goes.

        Returns:
            list of B PIL images, or (B, H, W, 3) float32, or (B, C, H/f, W/f) float32.

        Raises:
            InputError: an argument cannot be used; said before any network runs.
            ParityError: the networks' numbers are not finite.
            UnavailableError: out of memory.
        """
        start = perf_counter()
        if output not in OUTPUTS:
            raise InputError(f"unknown output {output!r}", where="output", fix=f"one of {', '.join(OUTPUTS)}")
        sessions = _Sessions(self.sessions, profile)
        run = self._scheduler(scheduler).start(
            whole(steps, "steps"), 1.0 if image is None else finite(strength, "strength"), finite(eta, "eta"))
        request = check_request(
            sessions, self.facts, prompt=prompt, negative_prompt=negative_prompt, images_per_prompt=images_per_prompt,
            guidance_scale=guidance_scale, seed=seed, height=height, width=width, image=image, latents=latents)
        with np.errstate(over="ignore", invalid="ignore"):  # every result is checked to be finite
            result = self._generate(sessions, request, run, output, on_step)
        if profile is not None:
            profile.total_seconds += perf_counter() - start
        return result

    def _generate(
        self, sessions: Mapping[str, Session], request: Request, run: Run, output: str,
        on_step: Callable[[Step], None] | None,
    ) -> Any:
        encoder = sessions["text_encoder"]
        cond = embed(request.prompts, self._tokenize, encoder, self._cache)
        uncond = embed(request.negatives, self._tokenize, encoder, self._cache) if request.negatives else None
        predict = GuidedUnet(sessions["unet"], cond, uncond, request.guidance_scale)
        noise = NoiseStreams(request.seeds)
        sample = self._initial(sessions, request, run, noise)
        sample = denoise(predict, run, sample, noise, on_step)
        if output == "latents":
            return sample
        decoder, factor = sessions["vae_decoder"], self.facts.scaling_factor
        if output == "numpy":
            return decode.decode(decoder, sample, factor)
        return to_pil(decode.decode_uint8(decoder, sample, factor))

    def _initial(
        self, sessions: Mapping[str, Session], request: Request, run: Run, noise: NoiseStreams
    ) -> Float32:
        """The noisy sample that denoising starts from: (B, C, H/f, W/f) float32."""
        original: Float32 | None = None
        if request.pictures is not None:
            mean, deviation = decode.encode(sessions["vae_encoder"], request.pictures)
            chosen = list(request.picture_of)
            original = mean[chosen] + deviation[chosen] * noise.draw(request.latent_shape)
            original *= np.float32(self.facts.scaling_factor)
        fresh = noise.draw(request.latent_shape) if request.latents is None else request.latents
        return fresh * np.float32(run.init_noise_sigma) if original is None else run.add_noise(original, fresh)

    def _scheduler(self, name: str | None) -> Scheduler:
        if name not in self._schedulers:
            self._schedulers[name] = from_config(self._config, name)
        return self._schedulers[name]


def denoise(
    predict: Callable[[Float32, float], Float32], run: Run, sample: Float32, noise: NoiseStreams,
    on_step: Callable[[Step], None] | None = None,
) -> Float32:
    """Take every step of a run.

    Args:
        predict: (sample as the U-Net wants it, timestep) -> prediction of the same shape.
        run: one run of a scheduler.
        sample: (B, C, H/f, W/f) float32 at the run's first noise level.
        noise: where steps that need fresh noise draw it.
        on_step: called after every step.

    Returns:
        the denoised latents, same shape.

    Raises:
        ParityError: the latents are not finite any more.
    """
    timesteps = [float(t) for t in run.timesteps]
    for i, timestep in enumerate(timesteps):
        prediction = predict(run.scale_model_input(sample, i), timestep)
        fresh = noise.draw(sample.shape[1:]) if run.needs_noise(i) else None
        sample = run.step(prediction, i, sample, fresh)
        if not all_finite(sample):
            raise ParityError(f"the latents are not finite after step {i + 1} of {len(timesteps)}", where="unet",
                              fix="build the U-Net in a higher precision")
        if on_step is not None:
            seen = sample.view()
            seen.setflags(write=False)
            on_step(Step(i, timestep, seen, len(timesteps)))
    return sample


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
