"""What tiles of large images need and whether they show: `python -m tests.deploy.seams` prints the table of the docs.

Images of 512x512 from the 64x64 reference model. Peak memory belongs to a process, so each size has one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TILE, STRIDE, FACTOR = 64, 32, 8
WHOLE = 256  # the largest image that the bundle generates in one piece: what the measure says where no tiles are
SIDE, STEPS, COUNT = 512, 6, 4
ROOT = Path(__file__).parents[2]
PROMPTS = ("flowers and leaves", "a red apple", "clouds", "pebbles on a beach", "a blue car", "grass")
LAYOUTS = {"whole": f"none, {WHOLE}x{WHOLE}", "move": "move at every step", "still": "lie still",
           "hard": "move, edges not blended"}
SEAMS = ("rows, beside", "rows, to all", "columns, beside", "columns, to all")
Images = NDArray[np.floating]


def generated(bundle: Path, side: int, tile: int, steps: int, count: int, layout: str = "move",
          threads: int = 1) -> tuple[Images, int]:
    """Images (count, side, side, 3) float32 in 0..1 and the peak memory of the process that drew them, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.npy"
        command = [sys.executable, "-m", "tests.deploy.seams", "generate",
                   json.dumps([str(bundle), side, tile, steps, count, layout, threads, str(out)])]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return np.load(out), json.loads(result.stdout)


def generate(bundle: str, side: int, tile: int, steps: int, count: int, layout: str, threads: int, out: str) -> None:
    """The child: generate one after the other, save them, print peak RSS."""
    import runtimes
    from runtimes.codec import tiling
    from runtimes.system.process_memory import peak_rss_bytes

    if layout == "still":
        tiling.Tiling.shifted = lambda self, i: self  # type: ignore[method-assign]
    if layout == "hard":
        tiling._window = lambda size: np.ones(size, np.float32)
    pipeline = runtimes.load(bundle, threads=threads, check_hashes=False)
    images = [pipeline(prompt, seed=seed, steps=steps, height=side, width=side, tile=tile or None, output="numpy")[0]
                for seed, prompt in enumerate(PROMPTS[:count])]
    np.save(out, np.stack(images))
    print(json.dumps(peak_rss_bytes()))


def seam_ratio(images: Images, axis: int, *, beside: bool) -> float:
    """Mean step across the lines where tiles begin and end, over that across other borders of latents.

    Steps are larger wherever the decoder goes on to the next latent, so lines within a latent are no measure.

    Args:
        images: (B, H, W, 3).
        axis: 0 for steps between rows, 1 between columns.
        beside: whether the other borders are the nearest on both sides, or all from the first line to the last.
    """
    steps = np.abs(np.diff(images, axis=axis + 1)).mean(axis=(0, 3, 2 - axis))
    lines = np.arange(STRIDE, images.shape[axis + 1] - FACTOR, STRIDE) - 1
    near = np.add.outer((-FACTOR, FACTOR), lines).ravel()
    others = near if beside else np.setdiff1d(np.arange(lines[0], lines[-1], FACTOR), lines)
    return float(steps[lines].mean() / steps[others].mean())


def interior_ratio(images: Images, axis: int) -> float:
    """Mean step across the lines where tiles begin and end, over that across every other line."""
    steps = np.abs(np.diff(images, axis=axis + 1)).mean(axis=(0, 3, 2 - axis))
    tile = np.arange(len(steps)) % STRIDE == STRIDE - 1
    return float(steps[tile].mean() / steps[~tile].mean())


def latent_ratio(images: Images, axis: int) -> float:
    """Mean step across borders of latents where no tile begins or ends, over that across lines within latents."""
    steps = np.abs(np.diff(images, axis=axis + 1)).mean(axis=(0, 3, 2 - axis))
    lines = np.arange(len(steps))
    border, tile = lines % FACTOR == FACTOR - 1, lines % STRIDE == STRIDE - 1
    return float(steps[border & ~tile].mean() / steps[~border].mean())


def seam_ratios(images: Images) -> dict[str, float]:
    """The four of them, under the names of the table's columns."""
    found = [seam_ratio(images, axis, beside=beside) for axis in (0, 1) for beside in (True, False)]
    return dict(zip(SEAMS, found, strict=True))


def main() -> None:
    """Generate in each layout, print memory and seams beside those of a single tile."""
    from rich.table import Table

    from deploy.building.run_build import run_build
    from deploy.core.spec import BuildSpec
    from tests.peers.results import new_report, save, show

    parser = argparse.ArgumentParser(prog="python -m tests.deploy.seams", description=main.__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the reference model for ONNX Runtime, built if need be")
    parser.add_argument("--images", type=int, default=COUNT, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    bundle = options.bundle or run_build(BuildSpec()).bundle.path
    report = new_report(side=SIDE, tile=TILE, steps=options.steps, images=options.images)
    _, base = generated(bundle, TILE, 0, options.steps, 1, threads=options.threads)
    table = Table("tiles", "seconds an image", "peak memory", "x one tile", *SEAMS, "to every line: rows, columns",
                  "latents: rows, columns")
    table.add_row(f"one, {TILE}x{TILE}", "", f"{base / 1e6:.1f} MB", "1.00")
    for layout in options.layouts:
        began = time.perf_counter()
        side, tile = (WHOLE, 0) if layout == "whole" else (SIDE, TILE)
        images, peak = generated(bundle, side, tile, options.steps, options.images, layout, options.threads)
        row = {"seconds": (time.perf_counter() - began) / options.images, "peak_rss_bytes": peak,
               "memory_ratio": peak / base, "seams": seam_ratios(images),
               "interior": [interior_ratio(images, axis) for axis in (0, 1)],
               "latents": [latent_ratio(images, axis) for axis in (0, 1)]}
        report["rows"][layout] = row
        table.add_row(LAYOUTS[layout], f"{row['seconds']:.1f}", f"{peak / 1e6:.1f} MB", f"{peak / base:.2f}",
                      *(f"{ratio:.2f}" for ratio in row["seams"].values()),
                      *(", ".join(f"{ratio:.2f}" for ratio in row[key]) for key in ("interior", "latents")))
    show(report, table, save(report, "seams"), 140)


if __name__ == "__main__":
    generate(*json.loads(sys.argv[2])) if sys.argv[1:2] == ["generate"] else main()
