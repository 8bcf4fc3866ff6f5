"""Scores prompt retrieval: whether the generated image is still nearest to the one that was asked for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtimes.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Gallery:
    """The images that a model was trained on, small, each with its name.

    The score of a set of generated images is the share whose nearest tile is the one of their prompt, nearest by the
    root mean square difference of RGB after a box filter down to the tile's size. Why this distance: it depends on no
    network, so nothing under test judges itself; the box filter over 2x2 pixels makes a shift by one pixel or
    the softness of an autoencoder cost little; and the reference model's subjects were chosen 0.2 RMS apart
    (`deploy/reference_models/choose_subjects.py`; 0.195 at least between the tiles of gallery.png, which another filter
    made), so an image closer than 0.097 to its own tile cannot be nearer to another.

    Attributes:
        names: of the tiles, all different.
        tiles: (N, tile, tile, 3) float32 pixels in 0..1.
    """

    names: tuple[str, ...]
    tiles: Array

    @classmethod
    def load(cls, file: Path, names: Sequence[str], columns: int = 28, tile: int = 32) -> Gallery:
        """Cut a contact sheet into tiles, row by row.

        Args:
            file: PNG, `columns` tiles wide.
            names: of the tiles in the sheet's order.
            columns: tiles in a row.
            tile: side of a tile in pixels.

        Raises:
            InputError: no such image, a sheet of another size than the names need, or a name given twice.
        """
        try:
            with Image.open(file) as image:
                sheet = np.asarray(image.convert("RGB"), np.float32) / 255
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"cannot read the gallery: {error}", where=str(file)) from error
        rows = -(-len(names) // columns)
        if sheet.shape[:2] != (rows * tile, columns * tile):
            raise InputError(f"the gallery is {sheet.shape[1]}x{sheet.shape[0]} pixels, {len(names)} names in "
                             f"{columns} columns need {columns * tile}x{rows * tile}", where=str(file))
        if len(set(names)) != len(names):
            raise InputError("a name is given twice", where=str(file))
        tiles = sheet.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        return cls(tuple(names), tiles[: len(names)])

    def index(self, prompt: str) -> int:
        """Position of the tile of that name.

        Raises:
            InputError: there is none; names the nearest.
        """
        if prompt in self.names:
            return self.names.index(prompt)
        near = difflib.get_close_matches(prompt, self.names, n=3)
        raise InputError(f"the gallery has no {prompt!r}", where="retrieval prompts",
                         fix=f"did you mean {' or '.join(near)}?" if near else "use names of the gallery")

    def nearest(self, images: Array) -> Array:
        """Index of the tile nearest to each image, -1 for one that is not finite: (B,) int64.

        Args:
            images: (B, H, W, 3) float32 pixels in 0..1, H and W multiples of the tile's side.

        Raises:
            InputError: another size.
        """
        small = self._shrunk(images).reshape(len(images), -1)
        tiles = self.tiles.reshape(len(self.tiles), -1).astype(np.float64)
        with np.errstate(all="ignore"):
            squared = (small**2).sum(1)[:, None] - 2 * small @ tiles.T + (tiles**2).sum(1)
        return np.where(np.isfinite(squared).all(axis=1), squared.argmin(axis=1), -1)

    def score(self, images: Array, prompts: Sequence[str]) -> float:
        """Share, 0 to 1, of images whose nearest tile is the one asked for.

        Args:
            images: (B, H, W, 3) float32 pixels in 0..1.
            prompts: B names of tiles.

        Raises:
            InputError: no images, another number of them than prompts, an unknown name, or an unusable size.
        """
        if not len(prompts) or len(images) != len(prompts):
            raise InputError(f"{len(images)} images for {len(prompts)} prompts", where="retrieval")
        wanted = np.array([self.index(prompt) for prompt in prompts])
        return float((self.nearest(images) == wanted).mean())

    def _shrunk(self, images: Array) -> Array:
        """Box filter to the tile's size: (B, tile, tile, 3) float64."""
        tile = self.tiles.shape[1]
        count, height, width, channels = images.shape
        if height % tile or width % tile or not height or not width:
            raise InputError(f"images of {width}x{height} cannot be averaged to {tile}x{tile}", where="retrieval",
                             fix=f"generate sizes that are multiples of {tile}")
        blocks = images.astype(np.float64).reshape(count, tile, height // tile, tile, width // tile, channels)
        shrunk: Array = blocks.mean(axis=(2, 4))
        return shrunk
