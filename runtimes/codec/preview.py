"""Turns latents to colours without the decoder, by a linear map fitted to the bundle's own decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import input_spec
from runtimes.backends.session import Session
from runtimes.bundle.roles import Codec
from runtimes.codec.autoencoder import decode, to_uint8

Float32 = NDArray[np.float32]
LATENTS = 2048
SIDE = 8


@dataclass(frozen=True)
class Colours:
    """An affine map from latents to RGB.

    Attributes:
        matrix: (C + 1, 3) float32; the last row is the colour of latents that are zero.
    """

    matrix: Float32

    def show(self, latents: Float32) -> NDArray[np.uint8]:
        """(B, C, h, w) float32 latents as (B, h, w, 3) uint8."""
        rgb = np.moveaxis(latents, 1, 3) @ self.matrix[:-1] + self.matrix[-1]
        return to_uint8(np.clip(rgb, 0, 1))


def fit(decoder: Session, codec: Codec, seed: int = 0) -> Colours:
    """Least squares between latents and the mean colour of the pixels that each becomes.

    The latents are half one colour per image, half changing from place to place, of unit variance together as
    the latents of images are: a decoder answers to both differently, and images hold both. Published factors would
    serve the autoencoders that they were published for; this serves any, fine-tuned ones included.

    Args:
        decoder: latents -> sample.
        codec: of the pipeline.
        seed: of the latents.
    """
    factor, random = codec.factor, np.random.default_rng(seed)
    rows = _side(decoder, codec, 2, codec.height // factor)
    columns = _side(decoder, codec, 3, codec.width // factor)
    count = max(LATENTS // (rows * columns), 1)
    even = random.standard_normal((count, codec.latent_channels, 1, 1))
    varied = random.standard_normal((count, codec.latent_channels, rows, columns))
    latents = ((even + varied) / np.sqrt(2)).astype(np.float32)
    pixels = decode(decoder, latents, codec)
    colours = pixels.reshape(count, rows, factor, columns, factor, 3).mean(axis=(2, 4)).reshape(-1, 3)
    flat = np.moveaxis(latents, 1, 3).reshape(-1, codec.latent_channels)
    matrix, *_ = np.linalg.lstsq(np.column_stack([flat, np.ones(len(flat))]), colours, rcond=None)
    return Colours(matrix.astype(np.float32))


def _side(decoder: Session, codec: Codec, position: int, default: int) -> int:
    """A small number of latent rows or columns that the decoder takes: small images are as good and cost less."""
    size = input_spec(decoder, codec.decoder.input).shape[position]
    if isinstance(size, int):
        return size
    axis = decoder.component.axes.get(size)
    if axis is None:
        return default
    return min(max(SIDE, axis.range.min), axis.range.max) // axis.multiple * axis.multiple or axis.multiple
