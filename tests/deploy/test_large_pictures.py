"""512x512 from the 64x64 reference model: what tiles need, and whether they show. Full size behind `slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runtimes
from runtimes import decode
from runtimes.tiling import Tiling

TILE, STRIDE = 64, 32
ROOT = Path(__file__).parents[2]


def drawn(bundle: Path, side: int, tile: int, steps: int, out: Path) -> tuple[np.ndarray, int]:
    """The picture and the peak memory of a process that draws it."""
    command = [sys.executable, "-m", "tests.runtimes.large_picture", *map(str, (bundle, side, tile, steps, out))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return np.load(out), json.loads(result.stdout)["peak_rss_bytes"]


def seam_ratio(picture: np.ndarray, axis: int) -> float:
    """Mean step across the lines where tiles begin and end, over that across the lines 2 to 6 pixels beside them.

    Beside them, because this model draws one thing in the middle of each tile: what the lines of a picture have in
    common depends on where in a tile they are.
    """
    steps = np.abs(np.diff(picture, axis=axis)).mean(axis=tuple(a for a in range(3) if a != axis))
    lines = np.arange(STRIDE, picture.shape[axis] - 8, STRIDE) - 1
    beside = np.concatenate([steps[lines + d] for d in (-6, -5, -4, -3, -2, 2, 3, 4, 5, 6)])
    return float(steps[lines].mean() / beside.mean())


@pytest.mark.parametrize(("side", "steps"), [(128, 2), pytest.param(512, 8, marks=pytest.mark.slow)])
def test_a_large_picture_needs_the_memory_of_a_tile_and_has_no_seams(reference_bundle, tmp_path, side, steps):
    """Seams are looked for at full size, where 15 lines a side tell them from what happens to be drawn there."""
    _, base = drawn(reference_bundle, TILE, 0, 2, tmp_path / "tile.npy")
    picture, peak = drawn(reference_bundle, side, TILE, steps, tmp_path / "large.npy")
    assert picture.shape == (side, side, 3) and picture.std() > 0.05
    assert peak <= 1.5 * base
    if side == 512:
        assert max(seam_ratio(picture, 0), seam_ratio(picture, 1)) <= 1.1


def test_decoding_in_tiles_adds_no_seam_to_what_decoding_the_whole_gives(reference_bundle):
    pipeline = runtimes.load(reference_bundle, threads=1, check_hashes=False)
    latents = pipeline("flowers and leaves", seed=1, steps=2, height=128, width=128, output="latents")
    decoder, facts = pipeline.sessions["vae_decoder"], pipeline.facts
    whole = decode.decode(decoder, latents, facts.scaling_factor)[0]
    side, tile = (size // facts.vae_scale_factor for size in (128, TILE))
    tiled = decode.decode_tiled(decoder, latents, facts.scaling_factor, Tiling((side, side), (tile, tile)),
                                facts.vae_scale_factor)[0]
    assert np.sqrt(np.mean((tiled - whole) ** 2)) < 0.05  # its attention and norms see a tile, not the whole
    for axis in (0, 1):
        assert seam_ratio(tiled, axis) <= 1.1 * seam_ratio(whole, axis)


def test_the_measure_sees_a_seam():
    picture = np.random.default_rng(0).random((256, 256, 3)) * 0.2
    assert 0.9 < seam_ratio(picture, 1) < 1.1
    for edge in range(STRIDE, 256, 2 * STRIDE):
        picture[:, edge : edge + STRIDE] += 0.2
    assert seam_ratio(picture, 1) > 1.5 and 0.9 < seam_ratio(picture, 0) < 1.1
