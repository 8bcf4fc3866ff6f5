"""Makes single calls of a pipeline's networks: the latents of an image, and the noise that the U-Net sees in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import run_rows
from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.codec import autoencoder
from runtimes.inputs.request import Request
from runtimes.inputs.request_fields import SizeConditions
from runtimes.inputs.resolved_request import resolve
from runtimes.pipeline.conditioner import Conditioner, Conditions
from runtimes.pipeline.initial_latents import inpaints
from runtimes.pipeline.loading import load_tokenizers, scheduler_config
from runtimes.schedulers.methods.ddim import Ddim
from runtimes.schedulers.prediction import to_epsilon
from runtimes.text.prompt_cache import PromptCache
from runtimes.text.prompt_encoder import PromptStyle

Float32 = NDArray[np.float32]
LEVELS = 6  # noise levels that predictions are asked at
CACHE_BYTES = 16 << 20


class Probe:
    """The networks of one pipeline, and its noise schedule.

    Attributes:
        levels: timesteps in the middle of equal parts of the schedule, clean first.
    """

    def __init__(self, sessions: Mapping[str, Session], bundle: Bundle) -> None:
        """Read tokenizers and noise schedule of a bundle.

        Raises:
            InputError: a U-Net that takes channels that are unknown.
        """
        self.roles = bundle.manifest.pipeline
        self._sessions, self._denoiser = sessions, sessions[self.roles.denoiser.component]
        self._conditioner = Conditioner(self.roles, load_tokenizers(bundle), PromptCache(CACHE_BYTES))
        self._schedule = Ddim.from_config(scheduler_config(bundle))
        count = self._schedule.num_train_timesteps
        self.levels = tuple((2 * i + 1) * count // (2 * LEVELS) for i in range(LEVELS))
        self._extra = self._over_grey() if inpaints(self._denoiser, self.roles) else None

    def _over_grey(self) -> Float32:
        """Mask and masked latents for a U-Net for inpainting to paint everything: (1, 1 + C, H/f, W/f) float32."""
        height, width = self.roles.codec.height, self.roles.codec.width
        grey = self.encode(np.zeros((1, 3, height, width), np.float32))
        return np.concatenate([np.ones_like(grey[:, :1]), grey], axis=1)

    def encode(self, pixels: Float32) -> Float32:
        """Mean latents of images, scaled as the U-Net takes them.

        Args:
            pixels: (B, 3, H, W) float32 in -1..1.

        Returns:
            (B, C, H/f, W/f) float32.
        """
        codec = self.roles.codec
        mean, _ = autoencoder.encode(self._sessions[codec.encoder.component], pixels, codec)
        return autoencoder.scaled(codec, mean)

    def decode(self, latents: Float32) -> Float32:
        """(B, C, H/f, W/f) float32 scaled latents to (B, H, W, 3) float32 pixels in 0..1."""
        return autoencoder.decode(self._sessions[self.roles.codec.decoder.component], latents, self.roles.codec)

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """The U-Net's conditions from prompts, one for each image."""
        wanted = resolve(self._sessions, self.roles, Request(prompts, seed=0), guided=False, strength=1.0)
        return self._conditioner.gather(self._sessions, PromptStyle(), wanted, SizeConditions())

    def predict(
        self, latents: Float32, prompts: Sequence[str], timestep: int, seed: int = 0
    ) -> tuple[Float32, Float32]:
        """Noise added to latents at one timestep, and the noise that the U-Net predicts.

        Args:
            latents: (B, C, H/f, W/f) float32 of unit variance.
            prompts: B texts.
            timestep: whole training step.
            seed: of the noise; equal seeds add equal noise.

        Returns:
            noise and prediction, (B, C, H/f, W/f) float32 each.
        """
        alpha, sigma = self._schedule.levels(timestep)
        noise = np.random.default_rng([seed, timestep]).standard_normal(latents.shape, np.float32)
        sample = np.float32(alpha) * latents + np.float32(sigma) * noise
        given, role = self.conditions(prompts), self.roles.denoiser
        extra = [] if self._extra is None else [np.repeat(self._extra, len(sample), axis=0)]
        feeds = {role.sample: np.concatenate([sample, *extra], axis=1),
                 role.timestep: np.full(len(sample), timestep, np.float32), **given.added}
        if self.roles.conditioner.context:
            feeds[self.roles.conditioner.context] = np.stack(given.cond)
        output = run_rows(self._denoiser, feeds, role.output).astype(np.float32)
        return noise, to_epsilon(self._schedule.prediction_type, output, sample, alpha, sigma)

    def signal(self, timestep: int) -> float:
        """Share of the variance at a timestep that is the image's.

        It is the squared error of the best linear guess of the noise, sigma x_t, where latents are white and of unit
        variance.
        """
        return float(self._schedule.levels(timestep)[0]) ** 2
