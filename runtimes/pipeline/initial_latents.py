"""Makes the latents that denoising starts from (noise, an image with noise), and the inpainting mask at their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import Described, input_spec
from runtimes.backends.session import Session
from runtimes.bundle.roles import Codec, Roles
from runtimes.codec import autoencoder
from runtimes.codec.autoencoder import Moments
from runtimes.codec.tiling import Tiling
from runtimes.errors import InputError
from runtimes.inputs.noise import NoiseStreams
from runtimes.inputs.resolved_request import Resolved
from runtimes.schedulers import Run

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Repaint:
    """The part of an image that a denoiser without channels for it must not change.

    Attributes:
        original: (B, C, H/f, W/f) float32 encoded image.
        noise: the run's initial noise, same shape.
        mask: (B, 1, H/f, W/f) float32, 1 where the image is painted anew.
    """

    original: Float32
    noise: Float32
    mask: Float32

    def put_back(self, sample: Float32, run: Run, i: int) -> Float32:
        """`sample` (B, C, H/f, W/f) float32 after step i with the rest of the image at the same noise level: Lugmayr et
        al., RePaint, arXiv 2201.09865, eq. 8, as StableDiffusionInpaintPipeline does it."""
        last = i + 1 == len(run.timesteps)
        rest = self.original if last else run.add_noise(self.original, self.noise, i + 1)
        return (1 - self.mask) * rest + self.mask * sample


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        sample: (B, C, H/f, W/f) float32 at the run's first noise level.
        extra: (B, 1 + C, H/f, W/f) float32, mask and masked image for a denoiser trained for inpainting, or None.
        repaint: for any other denoiser under a mask, or None.
    """

    sample: Float32
    extra: Float32 | None = None
    repaint: Repaint | None = None


@dataclass(frozen=True)
class Pixels:
    """The pixels that a start needs encoded.

    Attributes:
        original: the initial images, (K, 3, H, W) float32 in -1..1, or None.
        masked: what inpainting sees of them, as `original`, or None for a denoiser without channels for it.
    """

    original: Float32 | None = None
    masked: Float32 | None = None


def to_encode(wanted: Resolved, paints: bool) -> Pixels:
    """The pixels that a request's start needs encoded.

    Args:
        wanted: the request.
        paints: whether the denoiser takes mask and masked image.
    """
    masked = None
    if paints:
        if wanted.masks is None or wanted.images is None:  # everything is painted anew, over grey
            masked = np.zeros((1, 3, wanted.height, wanted.width), np.float32)
        else:
            masked = wanted.images * (wanted.masks < 0.5)
    return Pixels(None if paints and _from_noise(wanted) else wanted.images, masked)


def encode_all(
    encoder: Session, codec: Codec, parts: Sequence[tuple[Float32, Tiling | None]], *, together: bool
) -> list[Moments]:
    """Encode images of several requests.

    Args:
        encoder: of the autoencoder.
        codec: its role.
        parts: images (K, 3, H, W) float32 in -1..1, and their tiles.
        together: whether images of one size share calls; only what is tiled never does.
    """
    alone = [i for i, (_, tiling) in enumerate(parts) if tiling is not None or not together]
    found: dict[int, Moments] = {i: autoencoder.encode(encoder, parts[i][0], codec, parts[i][1]) for i in alone}
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i in set(range(len(parts))) - set(alone):
        by_size.setdefault(parts[i][0].shape[1:], []).append(i)
    for members in by_size.values():
        mean, deviation = autoencoder.encode(encoder, np.concatenate([parts[i][0] for i in members]), codec)
        at = 0
        for i in members:
            rows = slice(at, at + len(parts[i][0]))
            found[i] = mean[rows], None if deviation is None else deviation[rows]
            at = rows.stop
    return [found[i] for i in range(len(parts))]


def begin(
    roles: Roles, wanted: Resolved, run: Run, noise: NoiseStreams, original: Moments | None, masked: Moments | None
) -> Start:
    """Noise what was encoded. Random numbers are sampled in the order that diffusers samples them.

    Args:
        roles: of the pipeline.
        wanted: the request.
        run: of the scheduler.
        noise: the request's streams.
        original, masked: the encoded pixels of `to_encode`: mean and deviation, (K, C, H/f, W/f) float32 each.
    """
    codec = roles.codec
    image = None if original is None else _latents(codec, original, wanted.image_of, wanted, noise)
    fresh = noise.sample(wanted.latent_shape) if wanted.latents is None else wanted.latents
    pure = image is None or _from_noise(wanted)
    sample = fresh * np.float32(run.init_noise_sigma) if pure or image is None else run.add_noise(image, fresh)
    if masked is not None:
        return Start(sample, extra=_conditions(codec, wanted, masked, noise))
    if wanted.masks is None or image is None:
        return Start(sample)
    if codec.gives != "latents":
        noise.sample(wanted.latent_shape)  # diffusers encodes the masked image here too, and uses the numbers only
    return Start(sample, repaint=Repaint(image, fresh, _small(wanted)))


def inpaints(denoiser: Described, roles: Roles) -> bool:
    """Whether a denoiser takes mask and masked image besides the latents.

    Raises:
        InputError: it takes something else.
    """
    channels, found = roles.codec.latent_channels, input_spec(denoiser, roles.denoiser.sample).shape[1]
    if found not in (channels, 2 * channels + 1):
        raise InputError(f"the denoiser takes {found} channels, the latents have {channels}", where=denoiser.name,
                         fix=f"{channels}, or {2 * channels + 1} for inpainting, are known")
    return found != channels


def _from_noise(wanted: Resolved) -> bool:
    """Under a mask, all of the schedule starts from noise alone, and so do latents that the caller gives."""
    return wanted.masks is not None and (wanted.strength == 1 or wanted.latents is not None)


def _conditions(codec: Codec, wanted: Resolved, masked: Moments, noise: NoiseStreams) -> Float32:
    """Mask and masked image: (B, 1 + C, H/f, W/f) float32."""
    count, (_, rows, columns) = len(wanted.seeds), wanted.latent_shape
    if wanted.masks is None or wanted.images is None:
        of, mask = (0,) * count, np.ones((count, 1, rows, columns), np.float32)
    else:
        of, mask = wanted.image_of if len(wanted.images) > 1 else wanted.mask_of, _small(wanted)
    return np.concatenate([mask, _latents(codec, masked, of, wanted, noise)], axis=1)


def _small(wanted: Resolved) -> Float32:
    """The masks at the latents' size, nearest as diffusers': (B, 1, H/f, W/f) float32."""
    assert wanted.masks is not None
    factor = wanted.masks.shape[2] // wanted.latent_shape[1]
    return wanted.masks[list(wanted.mask_of), :, ::factor, ::factor]


def _latents(codec: Codec, moments: Moments, of: tuple[int, ...], wanted: Resolved, noise: NoiseStreams) -> Float32:
    """Encoded images as scaled latents, sampled from the encoder's distribution: (B, C, H/f, W/f) float32."""
    mean, deviation = moments
    latents = mean[list(of)]
    if deviation is not None:
        latents = latents + deviation[list(of)] * noise.sample(wanted.latent_shape)
    return autoencoder.scaled(codec, latents, masked=wanted.masks is not None)
