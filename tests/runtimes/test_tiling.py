"""Tiles: where they lie, that blending leaves no seam, and that images larger than the networks come out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.codec.tiling import Tiling
from runtimes.errors import InputError
from runtimes.inputs.request import Request
from runtimes.pipeline.diffusion import Pipeline
from tests.runtimes.fakes import CHANNELS, DDIM, FACTOR, FACTS, cached_pipeline, calls_of, fake_sessions, tokenize

SHAPES = [((8, 8), (8, 8)), ((16, 8), (8, 8)), ((13, 29), (8, 4)), ((9, 9), (8, 8)), ((64, 64), (8, 8))]


def make(**limits: Any) -> Pipeline:
    return Pipeline(fake_sessions(**limits), FACTS, DDIM, tokenize)


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
@pytest.mark.parametrize("unit", [1, 3])
def test_cutting_and_joining_gives_the_whole_back(shape, tile, unit):
    whole = np.random.default_rng(0).standard_normal((2, 3, shape[0] * unit, shape[1] * unit)).astype(np.float32)
    tiling = Tiling(shape, tile)
    tiles = list(tiling.cut(whole, unit))
    assert len(tiles) == tiling.count and {t.shape[2:] for t in tiles} == {(tile[0] * unit, tile[1] * unit)}
    np.testing.assert_allclose(tiling.join(tiles, unit), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_neighbours_share_at_least_half(shape, tile):
    index = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(1, 1, *shape)
    starts = [divmod(int(t[0, 0, 0, 0]), shape[1]) for t in Tiling(shape, tile).cut(index)]
    for axis in (0, 1):
        places = sorted({start[axis] for start in starts})
        assert places[0] == 0 and places[-1] == shape[axis] - tile[axis]
        assert all(b - a <= tile[axis] / 2 for a, b in pairwise(places))


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_tiles_lie_elsewhere_at_every_step_and_still_cover_the_whole(shape, tile):
    whole = np.random.default_rng(0).standard_normal((1, 2, *shape)).astype(np.float32)
    rows = np.broadcast_to(np.arange(shape[0], dtype=np.float32)[:, None], (1, 1, *shape))
    tiling, starts = Tiling(shape, tile), set()
    for i in range(12):
        shifted = tiling.shifted(i)
        tiles = list(shifted.cut(whole))
        assert len(tiles) == tiling.count and {t.shape[2:] for t in tiles} == {tile}
        np.testing.assert_allclose(shifted.join(tiles), whole, rtol=1e-5, atol=1e-5)
        starts |= {int(t[0, 0, 0, 0]) for t in shifted.cut(rows)}
    if shape == (64, 64):
        assert starts >= set(range(2, 54)) | {0, 56}  # no row but those at the image's edge is left out


def test_tiles_stay_where_they_were_while_deep_features_are_reused():
    """The deep feature of a tile belongs to its place."""
    request = Request("x", steps=8, guidance_interval=(0.25, 0.75), cache_interval=3, tile=32, height=64, width=64)
    (job,) = cached_pipeline().prepare([request])
    assert [job.whole_steps(i) for i in range(8)] == [1, 1, 2, 2, 2, 3, 4, 4]


def test_tiles_that_disagree_blend_without_a_step():
    """Every tile is flat with a level of its own: the worst that neighbours can do to each other."""
    tiling, random = Tiling((64, 64), (16, 16)), np.random.default_rng(0)
    tiles = [np.full((1, 1, 16, 16), random.standard_normal(), np.float32) for _ in range(tiling.count)]
    joined = tiling.join(tiles)[0, 0]
    steepest = max(np.abs(np.diff(joined, axis=axis)).max() for axis in (0, 1))
    largest = max(np.ptp([t[0, 0, 0, 0] for t in tiles]), 1)
    assert steepest < 0.2 * largest  # an unblended border jumps by up to all of it


def test_a_network_that_looks_at_single_places_generates_the_same_in_tiles():
    """Pointwise networks cannot tell a tile from the whole, so tiling must not show at all."""
    def pointwise(**limits: Any) -> Pipeline:
        pipeline = make(**limits)
        pipeline.sessions["unet"].function = lambda sample, timestep, encoder_hidden_states: (  # type: ignore[attr-defined]
            np.tanh(sample) * 0.7 + encoder_hidden_states.mean(axis=(1, 2))[:, None, None, None]).astype(np.float32)
        return pipeline

    options: dict[str, Any] = {"seed": [3, 4], "steps": 4, "height": 64, "width": 48, "output": "numpy"}
    whole = pointwise()(["x", "y"], **options)
    tiled = pointwise(side=(4, 8))(["x", "y"], tile=32, **options)
    np.testing.assert_allclose(tiled, whole, atol=1e-4)


def test_one_tile_at_a_time_goes_through_the_networks():
    pipeline = make(side=(4, 8))
    image = pipeline("x", seed=0, steps=2, height=128, width=96, tile=32, output="numpy")
    assert image.shape == (1, 128, 96, 3)
    assert {call["sample"].shape for call in calls_of(pipeline, "unet")} == {(2, CHANNELS, 8, 8)}
    assert {call["latent_sample"].shape for call in calls_of(pipeline, "vae_decoder")} == {(1, CHANNELS, 8, 8)}


def test_image_to_image_and_inpainting_work_in_tiles():
    image = Image.effect_noise((96, 128), 90).convert("RGB")
    mask = np.zeros((128, 96), np.uint8)
    mask[:, 48:] = 255
    options: dict[str, Any] = {"seed": 0, "steps": 4, "tile": 32, "output": "latents"}
    options |= {"height": 128, "width": 96}
    kept = make(side=(4, 8))("x", image=image, mask=Image.new("L", (96, 128)), **options)
    half = make(side=(4, 8))("x", image=image, mask=mask, **options)
    assert half.shape == (1, CHANNELS, 128 // FACTOR, 96 // FACTOR)
    np.testing.assert_array_equal(half[..., :12], kept[..., :12])
    assert (half[..., 12:] != kept[..., 12:]).all()


def test_a_tile_as_large_as_the_image_changes_nothing():
    options: dict[str, Any] = {"seed": 0, "steps": 3, "output": "latents"}
    np.testing.assert_array_equal(make()("x", tile=64, **options), make()("x", **options))


@pytest.mark.parametrize(("options", "word"), [
    ({"tile": 0}, "tile"), ({"tile": 36, "height": 128, "width": 128}, "height is 36"), ({"tile": "big"}, "tile"),
    ({"tile": 32, "height": 130}, "multiple of 4"), ({"tile": 32, "width": 1 << 20}, "up to 8,192"),
])
def test_unusable_tiles_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        make(side=(4, 8))("x", steps=2, **options)
