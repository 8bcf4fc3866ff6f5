"""What denoising starts from: noise, a noised image, and what inpainting keeps of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import Described, input_spec
from runtimes.backends.session import Session
from runtimes.bundle.manifest import PipelineFacts
from runtimes.codec import autoencoder
from runtimes.errors import InputError
from runtimes.pipeline.noise import NoiseStreams
from runtimes.pipeline.request import Request
from runtimes.schedulers import Run

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """The part of an image that a U-Net without channels for it must not repaint.

    Attributes:
        original: (B, C, H/f, W/f) float32 encoded image.
        noise: the run's initial noise, same shape.
        mask: (B, 1, H/f, W/f) float32, 1 where the image is painted anew.
    """

    original: Float32
    noise: Float32
    mask: Float32

    def put_back(self, sample: Float32, run: Run, i: int) -> Float32:
        """`sample` after step i with the kept part at the same noise level: Lugmayr et al., RePaint, arXiv 2201.09865,
        eq. 8, as StableDiffusionInpaintPipeline does it."""
        last = i + 1 == len(run.timesteps)
        kept = self.original if last else run.add_noise(self.original, self.noise, i + 1)
        return (1 - self.mask) * kept + self.mask * sample


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        sample: (B, C, H/f, W/f) float32 at the run's first noise level.
        extra: (B, 1 + C, H/f, W/f) float32, mask and masked image for a U-Net trained for inpainting, or None.
        kept: for any other U-Net under a mask, or None.
    """

    sample: Float32
    extra: Float32 | None = None
    kept: Kept | None = None


def begin(
    sessions: Mapping[str, Session], facts: PipelineFacts, request: Request, run: Run, noise: NoiseStreams
) -> Start:
    """Encode and noise what a request asks for. Random numbers are sampled in the order that diffusers samples them.

    Raises:
        InputError: the U-Net takes channels that are not those of latents, a mask and a masked image.
    """
    paints = inpaints(sessions["unet"], request.latent_shape[0])
    # Under a mask, all of the schedule starts from noise alone, and so do latents that the caller gives.
    pure = request.masks is not None and (request.strength == 1 or request.latents is not None)
    original: Float32 | None = None
    if request.images is not None and not (paints and pure):
        original = _encoded(sessions, facts, request.images, request.image_of, request, noise)
    fresh = noise.sample(request.latent_shape) if request.latents is None else request.latents
    sample = fresh * np.float32(run.init_noise_sigma) if pure or original is None else run.add_noise(original, fresh)
    if paints:
        return Start(sample, extra=_conditions(sessions, facts, request, noise))
    if request.masks is None or original is None:
        return Start(sample)
    if sessions["vae_encoder"].component.outputs[0].name != "latents":
        noise.sample(request.latent_shape)  # diffusers encodes the masked image here too, and uses the numbers only
    return Start(sample, kept=Kept(original, fresh, _small(request)))


def inpaints(unet: Described, channels: int) -> bool:
    """Whether a U-Net takes mask and masked image besides latents of so many channels.

    Raises:
        InputError: it takes something else.
    """
    found = input_spec(unet, "sample").shape[1]
    if found not in (channels, 2 * channels + 1):
        raise InputError(f"the U-Net takes {found} channels, the latents have {channels}", where="unet",
                         fix=f"{channels}, or {2 * channels + 1} for inpainting, are known")
    return found != channels


def _conditions(
    sessions: Mapping[str, Session], facts: PipelineFacts, request: Request, noise: NoiseStreams
) -> Float32:
    """Mask and masked image; without a mask everything is painted anew, without an image over grey."""
    count, (_, rows, columns) = len(request.seeds), request.latent_shape
    if request.masks is None or request.images is None:
        factor = request.height // rows
        masked, of = np.zeros((1, 3, rows * factor, columns * factor), np.float32), (0,) * count
        mask = np.ones((count, 1, rows, columns), np.float32)
    else:
        masked = request.images * (request.masks < 0.5)
        of = request.image_of if len(request.images) > 1 else request.mask_of
        mask = _small(request)
    return np.concatenate([mask, _encoded(sessions, facts, masked, of, request, noise)], axis=1)


def _small(request: Request) -> Float32:
    """The masks at the latents' size, nearest as diffusers': (B, 1, H/f, W/f) float32."""
    assert request.masks is not None
    factor = request.masks.shape[2] // request.latent_shape[1]
    return request.masks[list(request.mask_of), :, ::factor, ::factor]


def _encoded(
    sessions: Mapping[str, Session], facts: PipelineFacts, images: Float32, of: tuple[int, ...], request: Request,
    noise: NoiseStreams,
) -> Float32:
    """Images as scaled latents, generated from the encoder's distribution: (B, C, H/f, W/f) float32."""
    factor = request.height // request.latent_shape[1]
    mean, deviation = autoencoder.encode(sessions["vae_encoder"], images, request.tiling, factor)
    latents = mean[list(of)]
    if deviation is not None:
        latents = latents + deviation[list(of)] * noise.sample(request.latent_shape)
    return autoencoder.scaled(facts, latents, masked=request.masks is not None)
