"""512x512 from the 64x64 reference model: what tiles need, and whether they show. Full size behind `slow`."""

from __future__ import annotations

import numpy as np
import pytest

import runtimes
from runtimes.codec import autoencoder
from runtimes.codec.tiling import Tiling
from tests.deploy.seams import COUNT, SIDE, STEPS, STRIDE, TILE, generated, seam_ratio, seam_ratios


@pytest.mark.parametrize(("side", "steps", "count"), [
    (128, 2, 1), pytest.param(SIDE, STEPS, COUNT, marks=pytest.mark.slow)])
def test_large_images_need_the_memory_of_a_tile_and_have_no_seams(reference_bundle, side, steps, count):
    """Seams are looked for at full size in several images: what is generated makes any one line strong or weak."""
    _, base = generated(reference_bundle, TILE, 0, 2, 1)
    images, peak = generated(reference_bundle, side, TILE, steps, count)
    assert images.shape == (count, side, side, 3) and images.std() > 0.05
    assert peak <= 1.5 * base
    if side == SIDE:
        ratios = seam_ratios(images)
        assert max(ratios.values()) <= 1.1, ratios


def test_decoding_in_tiles_adds_no_seam_to_what_decoding_the_whole_gives(reference_bundle):
    pipeline = runtimes.load(reference_bundle, threads=1, check_hashes=False)
    latents = pipeline("flowers and leaves", seed=1, steps=8, height=128, width=128, output="latents")
    decoder, codec = pipeline.sessions["vae_decoder"], pipeline.roles.codec
    whole = autoencoder.decode(decoder, latents, codec)[0]
    side, tile = (size // codec.factor for size in (128, TILE))
    tiled = autoencoder.decode_tiled(decoder, latents, codec, Tiling((side, side), (tile, tile)))[0]
    assert np.sqrt(np.mean((tiled - whole) ** 2)) < 0.05  # its attention and norms see a tile, not the whole
    for axis in (0, 1):
        for beside in (True, False):
            ratios = [seam_ratio(image[None], axis, beside=beside) for image in (tiled, whole)]
            assert ratios[0] <= 1.1 * ratios[1]


def test_the_measure_sees_a_seam():
    image = np.random.default_rng(0).random((256, 256, 3)) * 0.2
    assert all(0.9 < seam_ratio(image[None], 1, beside=beside) < 1.1 for beside in (True, False))
    for edge in range(STRIDE, 256, 2 * STRIDE):
        image[:, edge : edge + STRIDE] += 0.2
    for beside in (True, False):
        assert seam_ratio(image[None], 1, beside=beside) > 1.5
        assert 0.9 < seam_ratio(image[None], 0, beside=beside) < 1.1
