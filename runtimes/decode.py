"""Latents and pixels: the two halves of the autoencoder, in chunks of the batch they were built for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from runtimes.batching import row_range, run_rows, slices
from runtimes.errors import ParityError
from runtimes.session import Session
from runtimes.tiling import Tiling

Float32 = NDArray[np.float32]


def decode(decoder: Session, latents: Float32, scaling_factor: float, at_once: int | None = None) -> Float32:
    """Latents to pixels.

    Args:
        decoder: latent_sample -> sample in -1..1.
        latents: (B, C, H/f, W/f) float32 as denoised.
        scaling_factor: what the latents were multiplied by.
        at_once: at most so many images share a call; as many as the decoder takes if None.

    Returns:
        (B, H, W, 3) float32 in 0..1.

    Raises:
        ParityError: the decoder's output is not finite.
    """
    return np.concatenate(list(_decoded(decoder, latents, scaling_factor, at_once)))


def decode_tiled(decoder: Session, latents: Float32, scaling_factor: float, tiling: Tiling, factor: int) -> Float32:
    """As `decode`, tile by tile and blended, one image in a call; `factor` is pixels per latent."""
    tiles = (decode(decoder, tile, scaling_factor, 1).transpose(0, 3, 1, 2) for tile in tiling.cut(latents))
    return tiling.join(tiles, factor).transpose(0, 2, 3, 1)


def decode_uint8(
    decoder: Session, latents: Float32, scaling_factor: float, at_once: int | None = None
) -> NDArray[np.uint8]:
    """As `decode`, rounded to (B, H, W, 3) uint8 chunk by chunk."""
    return np.concatenate([to_uint8(chunk) for chunk in _decoded(decoder, latents, scaling_factor, at_once)])


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


def _decoded(decoder: Session, latents: Float32, scaling_factor: float, at_once: int | None) -> Iterator[Float32]:
    most = row_range(decoder).max
    for part in slices(len(latents), min(most, at_once or most)):
        sample = run_rows(decoder, {"latent_sample": latents[part] / np.float32(scaling_factor)}, "sample")
        if not np.isfinite(sample).all():
            raise ParityError("the decoded image is not finite", where=decoder.name,
                              fix="build the decoder in a higher precision")
        pixels: Float32 = sample.astype(np.float32, copy=False).transpose(0, 2, 3, 1) / np.float32(2)
        yield np.clip(pixels + np.float32(0.5), 0, 1)
