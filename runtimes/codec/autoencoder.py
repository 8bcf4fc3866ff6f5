"""Encodes pixels to latents and decodes latents to pixels, in chunks of the batch the autoencoder was built for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import row_range, run_rows, slices
from runtimes.backends.session import Session
from runtimes.bundle.roles import Codec
from runtimes.codec.tiling import Tiling
from runtimes.errors import ParityError

Float32 = NDArray[np.float32]
Moments = tuple[Float32, Float32 | None]


def scaled(codec: Codec, encoded: Float32, *, masked: bool = False) -> Float32:
    """What an encoder gives, as the denoiser knows it: about unit variance.

    Args:
        codec: with scale and shift, or the channels' mean and deviation.
        encoded: (B, C, H/f, W/f) float32.
        masked: for inpainting, where StableDiffusionXLInpaintPipeline (`_encode_vae_image`) leaves mean and deviation
            out, although it brings them back when it decodes.

    Returns:
        (B, C, H/f, W/f) float32.
    """
    factor = np.float32(codec.scaling_factor)
    if codec.shift_factor:
        encoded = encoded - np.float32(codec.shift_factor)
    if masked or not codec.latents_std:
        return encoded * factor
    mean, deviation = _channels(codec)
    normal: Float32 = (encoded - mean) * factor / deviation
    return normal


def unscaled(codec: Codec, latents: Float32) -> Float32:
    """Denoised latents as the decoder takes them; the inverse of `scaled`: (B, C, H/f, W/f) float32."""
    factor = np.float32(codec.scaling_factor)
    if not codec.latents_std:
        plain: Float32 = latents / factor
        return plain + np.float32(codec.shift_factor) if codec.shift_factor else plain
    mean, deviation = _channels(codec)
    wide: Float32 = latents * deviation / factor + mean
    return wide


def _channels(codec: Codec) -> tuple[Float32, Float32]:
    """Mean and deviation of the latents: (C, 1, 1) float32 each."""
    mean, deviation = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (codec.latents_mean, codec.latents_std))
    return mean, deviation


def decode(decoder: Session, latents: Float32, codec: Codec, at_once: int | None = None) -> Float32:
    """Latents to pixels.

    Args:
        decoder: latents -> sample in -1..1.
        latents: (B, C, H/f, W/f) float32 as denoised.
        codec: says how the latents were scaled, and the decoder's input and output.
        at_once: at most so many images share a call; as many as the decoder takes if None.

    Returns:
        (B, H, W, 3) float32 in 0..1.

    Raises:
        ParityError: the decoder's output is not finite.
    """
    return np.concatenate([to_unit(sample, decoder.name) for _, sample in decoded(decoder, latents, codec, at_once)])


def decode_tiled(decoder: Session, latents: Float32, codec: Codec, tiling: Tiling) -> Float32:
    """As `decode`, tile by tile and blended, one image in a call: pixels (B, H, W, 3) float32 in 0..1."""
    tiles = (decode(decoder, tile, codec, 1).transpose(0, 3, 1, 2) for tile in tiling.cut(latents))
    return tiling.join(tiles, codec.factor).transpose(0, 2, 3, 1)


def decoded(decoder: Session, latents: Float32, codec: Codec, at_once: int | None) -> Iterator[tuple[slice, Float32]]:
    """The decoder's outputs chunk by chunk.

    Args:
        decoder, codec, at_once: as `decode`.
        latents: (B, C, H/f, W/f) float32 as denoised.

    Yields:
        which of the B images, and their (n, 3, H, W) float32, in -1..1 if all is well.
    """
    most = row_range(decoder).max
    for part in slices(len(latents), min(most, at_once or most)):
        sample = run_rows(decoder, {codec.decoder.input: unscaled(codec, latents[part])}, codec.decoder.output)
        yield part, sample.astype(np.float32, copy=False)


def to_unit(sample: Float32, where: str) -> Float32:
    """A decoder's output (B, 3, H, W) float32 in -1..1 as pixels (B, H, W, 3) float32 in 0..1.

    Raises:
        ParityError: it is not finite.
    """
    if not np.isfinite(sample).all():
        raise ParityError("the decoded image is not finite", where=where, fix="build the decoder in a higher precision")
    pixels = sample.transpose(0, 2, 3, 1) / np.float32(2)
    clipped: Float32 = np.clip(pixels + np.float32(0.5), 0, 1)
    return clipped


def to_uint8(pixels: Float32) -> NDArray[np.uint8]:
    """Pixels (B, H, W, 3) float32 in 0..1 to uint8 in 0..255, halves to even as diffusers' `numpy_to_pil`."""
    return np.rint(pixels * 255).astype(np.uint8)


def encode(encoder: Session, pixels: Float32, codec: Codec, tiling: Tiling | None = None) -> Moments:
    """Pixels to the moments of their latents' normal distribution.

    Args:
        encoder: sample -> mean and log-variance side by side on the channels, or latents.
        pixels: (B, 3, H, W) float32 in -1..1.
        codec: says what the encoder gives, and its input and output.
        tiling: encode tile by tile and blend the moments.

    Returns:
        mean and standard deviation, (B, C, H/f, W/f) float32 each, not yet scaled; no deviation of an autoencoder
        without a distribution.
    """
    def encoded(part: Float32) -> Float32:
        return run_rows(encoder, {codec.encoder.input: part}, codec.encoder.output).astype(np.float32, copy=False)

    parameters = encoded(pixels) if tiling is None else tiling.join(map(encoded, tiling.cut(pixels, codec.factor)))
    if codec.gives == "latents":
        return parameters, None
    mean, logvar = np.split(parameters, 2, axis=1)
    return mean, np.exp(0.5 * np.clip(logvar, -30.0, 20.0))
