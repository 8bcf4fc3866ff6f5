"""Latents and pixels: the two halves of the autoencoder, in chunks of the batch they were built for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import row_range, run_rows, slices
from runtimes.backends.session import Session
from runtimes.bundle.manifest import PipelineFacts
from runtimes.codec.tiling import Tiling
from runtimes.errors import ParityError

Float32 = NDArray[np.float32]


def scaled(facts: PipelineFacts, encoded: Float32, *, masked: bool = False) -> Float32:
    """What an encoder gives, as the U-Net knows it: about unit variance.

    Args:
        facts: with the autoencoder's scaling factor and, if it has them, its channels' mean and deviation.
        encoded: (B, C, H/f, W/f) float32.
        masked: for inpainting, where StableDiffusionXLInpaintPipeline (`_encode_vae_image`) leaves mean and deviation
            out, although it brings them back when it decodes.
    """
    factor = np.float32(facts.scaling_factor)
    if masked or not facts.latents_std:
        return encoded * factor
    mean, deviation = _channels(facts)
    normal: Float32 = (encoded - mean) * factor / deviation
    return normal


def unscaled(facts: PipelineFacts, latents: Float32) -> Float32:
    """Denoised latents as the decoder takes them; the inverse of `scaled`: (B, C, H/f, W/f) float32."""
    factor = np.float32(facts.scaling_factor)
    if not facts.latents_std:
        return latents / factor
    mean, deviation = _channels(facts)
    wide: Float32 = latents * deviation / factor + mean
    return wide


def _channels(facts: PipelineFacts) -> tuple[Float32, Float32]:
    """Mean and deviation of the latents: (C, 1, 1) float32 each."""
    mean, deviation = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (facts.latents_mean, facts.latents_std))
    return mean, deviation


def decode(decoder: Session, latents: Float32, facts: PipelineFacts, at_once: int | None = None) -> Float32:
    """Latents to pixels.

    Args:
        decoder: latent_sample -> sample in -1..1.
        latents: (B, C, H/f, W/f) float32 as denoised.
        facts: of the pipeline, which say how the latents were scaled.
        at_once: at most so many images share a call; as many as the decoder takes if None.

    Returns:
        (B, H, W, 3) float32 in 0..1.

    Raises:
        ParityError: the decoder's output is not finite.
    """
    return np.concatenate(list(_decoded(decoder, latents, facts, at_once)))


def decode_tiled(decoder: Session, latents: Float32, facts: PipelineFacts, tiling: Tiling) -> Float32:
    """As `decode`, tile by tile and blended, one image in a call."""
    tiles = (decode(decoder, tile, facts, 1).transpose(0, 3, 1, 2) for tile in tiling.cut(latents))
    return tiling.join(tiles, facts.vae_scale_factor).transpose(0, 2, 3, 1)


def decode_uint8(
    decoder: Session, latents: Float32, facts: PipelineFacts, at_once: int | None = None
) -> NDArray[np.uint8]:
    """As `decode`, rounded to (B, H, W, 3) uint8 chunk by chunk."""
    return np.concatenate([to_uint8(chunk) for chunk in _decoded(decoder, latents, facts, at_once)])


def to_uint8(pixels: Float32) -> NDArray[np.uint8]:
    """0..1 to 0..255, halves to even as diffusers' `numpy_to_pil`."""
    return np.rint(pixels * 255).astype(np.uint8)


def encode(
    encoder: Session, pixels: Float32, tiling: Tiling | None = None, factor: int = 1
) -> tuple[Float32, Float32 | None]:
    """Pixels to the moments of their latents' normal distribution.

    Args:
        encoder: sample -> latent_parameters, mean and log-variance side by side on the channels, or latents.
        pixels: (B, 3, H, W) float32 in -1..1.
        tiling: encode tile by tile and blend the moments.
        factor: pixels per latent, for tiles.

    Returns:
        mean and standard deviation, (B, C, H/f, W/f) float32 each, not yet scaled; no deviation of an autoencoder
        without a distribution.
    """
    output = encoder.component.outputs[0].name

    def encoded(part: Float32) -> Float32:
        return run_rows(encoder, {"sample": part}, output).astype(np.float32, copy=False)

    parameters = encoded(pixels) if tiling is None else tiling.join(map(encoded, tiling.cut(pixels, factor)))
    if output == "latents":
        return parameters, None
    mean, logvar = np.split(parameters, 2, axis=1)
    return mean, np.exp(0.5 * np.clip(logvar, -30.0, 20.0))


def _decoded(decoder: Session, latents: Float32, facts: PipelineFacts, at_once: int | None) -> Iterator[Float32]:
    most = row_range(decoder).max
    for part in slices(len(latents), min(most, at_once or most)):
        sample = run_rows(decoder, {"latent_sample": unscaled(facts, latents[part])}, "sample")
        if not np.isfinite(sample).all():
            raise ParityError("the decoded image is not finite", where=decoder.name,
                              fix="build the decoder in a higher precision")
        pixels: Float32 = sample.astype(np.float32, copy=False).transpose(0, 2, 3, 1) / np.float32(2)
        yield np.clip(pixels + np.float32(0.5), 0, 1)
