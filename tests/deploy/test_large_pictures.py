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


def drawn(bundle: Path, side: int, tile: int, steps: int, count: int, out: Path) -> tuple[np.ndarray, int]:
    """The pictures and the peak memory of a process that draws them one after the other."""
    command = [sys.executable, "-m", "tests.runtimes.large_picture", *map(str, (bundle, side, tile, steps, count, out))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return np.load(out), json.loads(result.stdout)["peak_rss_bytes"]


def seam_ratio(pictures: np.ndarray, axis: int, *, beside: bool) -> float:
    """Mean step across the lines where tiles begin and end, over that across other lines.

    Args:
        pictures: (B, H, W, 3).
        axis: 0 for steps between rows, 1 between columns.
        beside: whether the other lines are those 2 to 6 pixels beside them, or all from the first to the last of them.
    """
    steps = np.abs(np.diff(pictures, axis=axis + 1)).mean(axis=(0, 3, 2 - axis))
    lines = np.arange(STRIDE, pictures.shape[axis + 1] - 8, STRIDE) - 1
    near = np.add.outer((-6, -5, -4, -3, -2, 2, 3, 4, 5, 6), lines).ravel()
    others = near if beside else np.setdiff1d(np.arange(lines[0], lines[-1]), lines)
    return float(steps[lines].mean() / steps[others].mean())


@pytest.mark.parametrize(("side", "steps", "count"), [(128, 2, 1), pytest.param(512, 8, 6, marks=pytest.mark.slow)])
def test_large_pictures_need_the_memory_of_a_tile_and_have_no_seams(reference_bundle, tmp_path, side, steps, count):
    """Seams are looked for at full size in several pictures: what is drawn makes any one line strong or weak."""
    _, base = drawn(reference_bundle, TILE, 0, 2, 1, tmp_path / "tile.npy")
    pictures, peak = drawn(reference_bundle, side, TILE, steps, count, tmp_path / "large.npy")
    assert pictures.shape == (count, side, side, 3) and pictures.std() > 0.05
    assert peak <= 1.5 * base
    if side == 512:
        ratios = {(axis, beside): seam_ratio(pictures, axis, beside=beside)
                  for axis in (0, 1) for beside in (True, False)}
        assert max(ratios.values()) <= 1.1, ratios


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
        for beside in (True, False):
            ratios = [seam_ratio(picture[None], axis, beside=beside) for picture in (tiled, whole)]
            assert ratios[0] <= 1.1 * ratios[1]


def test_the_measure_sees_a_seam():
    picture = np.random.default_rng(0).random((256, 256, 3)) * 0.2
    assert all(0.9 < seam_ratio(picture[None], 1, beside=beside) < 1.1 for beside in (True, False))
    for edge in range(STRIDE, 256, 2 * STRIDE):
        picture[:, edge : edge + STRIDE] += 0.2
    for beside in (True, False):
        assert seam_ratio(picture[None], 1, beside=beside) > 1.5
        assert 0.9 < seam_ratio(picture[None], 0, beside=beside) < 1.1
