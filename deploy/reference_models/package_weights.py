"""`python -m deploy.reference_models.package_weights [FOLDER]` puts a trained model into the package.

It copies the fp16 pipeline that training left to `weights/`, without what a reader does not need, and renders
`gallery.png`, the 32x32 contact sheet by which retrieval is scored.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from deploy.reference_models import GALLERY_COLUMNS, GALLERY_FILE, GALLERY_TILE, WEIGHTS
from deploy.reference_models.emoji_data import load_subjects, on_white, render_all
from deploy.reference_models.train import CHECKPOINTS


def write_gallery() -> None:
    """Render every subject on white, box-downsampled from 64x64, in the order of subjects.json."""
    images = on_white(render_all([s.character for s in load_subjects()], 2 * GALLERY_TILE)).astype(np.float32)
    small = images.reshape(-1, GALLERY_TILE, 2, GALLERY_TILE, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    rows = -(-len(small) // GALLERY_COLUMNS)
    sheet = np.full((rows * GALLERY_TILE, GALLERY_COLUMNS * GALLERY_TILE, 3), 255, np.uint8)
    for i, image in enumerate(small):
        y, x = (GALLERY_TILE * n for n in divmod(i, GALLERY_COLUMNS))
        sheet[y : y + GALLERY_TILE, x : x + GALLERY_TILE] = image
    Image.fromarray(sheet).save(GALLERY_FILE, optimize=True)


def main(folder: Annotated[Path, typer.Argument(help="folder of `train`")] = CHECKPOINTS) -> None:
    """Copy the finished model into the package."""
    partial = WEIGHTS.with_name(".weights.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "model", partial)
    for layout in ("vocab.json", "merges.txt"):  # for readers older than transformers 5
        shutil.copy(folder / "tokenizer" / layout, partial / "tokenizer" / layout)
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    partial.rename(WEIGHTS)
    write_gallery()
    size = sum(p.stat().st_size for p in WEIGHTS.rglob("*.safetensors"))
    typer.echo(f"{WEIGHTS}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    typer.run(main)
