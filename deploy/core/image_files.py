"""Writes images and arrays as files, whole or not at all: several images as one sheet or as numbered files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.bundle.folder import replacing
from runtimes.inputs.image_texts import chunks

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def save_preview(images: np.ndarray[Any, Any], factor: int, file: Path) -> None:
    """Write pixels (B, h, w, 3) uint8 side by side as one PNG, `factor` times larger."""
    from PIL import Image as PillowImage

    enlarged = [PillowImage.fromarray(p).resize((p.shape[1] * factor, p.shape[0] * factor)) for p in images]
    save_images(enlarged, file, len(enlarged), [])


def save_array(array: np.ndarray[Any, Any], file: Path) -> None:
    """Write an array of any shape and dtype, latents or pixels, as .npy through a temporary sibling."""
    import numpy as np

    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def save_images(
    images: list[Image], output: Path, columns: int, texts: Sequence[Mapping[str, str]]
) -> list[Path]:
    """Write PNG files through temporary siblings: one sheet if columns > 0, else one file an image.

    Args:
        images: of one size.
        output: name of the file, or of numbered siblings.
        columns: of the sheet.
        texts: key -> value for each image's text chunks, or nothing; a sheet says what its images say, a line each.
    """
    if columns > 0:
        images = [contact_sheet(images, columns)]
        texts = [{key: "\n".join(dict.fromkeys(t[key] for t in texts)) for key in texts[0]}] if texts else []
    names = [output] if len(images) == 1 else [
        output.with_name(f"{output.stem}-{i + 1:0{len(str(len(images)))}d}{output.suffix or '.png'}")
        for i in range(len(images))
    ]
    for number, (image, file) in enumerate(zip(images, names, strict=True)):
        with replacing(file) as partial:
            image.save(partial, format="PNG", pnginfo=chunks(texts[number]) if texts else None)
    return names


def contact_sheet(images: list[Image], columns: int) -> Image:
    """Images of one size, row by row, on white."""
    from PIL import Image as PillowImage

    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = PillowImage.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * width, (i // columns) * height))
    return sheet
