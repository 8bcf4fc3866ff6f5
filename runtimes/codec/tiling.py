"""Makes images larger than the networks were built for, from overlapping tiles that are blended smoothly.

Bar-Tal et al., MultiDiffusion, arXiv 2302.08113: at every step each tile is predicted on its own and the predictions
are averaged where tiles overlap, eq. 5 with weights that fall off towards a tile's border. The autoencoder's halves
are tiled and blended alike. A tile knows nothing of its neighbours but what the overlap says, so a prompt should
describe what may be anywhere. Tiles lie elsewhere at every step (as in Du et al., DemoFusion, arXiv 2311.16973,
section 3.4), so that no place of the image is always at a border and none always in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
OVERLAP = 0.5


class Tiling:
    """Where tiles lie on a grid of latents, and how they are blended. Holds no image.

    Attributes:
        count: number of tiles.
        area: latents of one tile.
        tile: rows and columns of one.
    """

    def __init__(self, shape: tuple[int, int], tile: tuple[int, int]) -> None:
        """Spread tiles of latents evenly over a grid, neighbours sharing at least half of their rows or columns.

        Args:
            shape: rows and columns of the whole.
            tile: rows and columns of a tile, at most those of the whole.
        """
        self._shape, self.tile = shape, tile
        self._rows, self._columns = _places(shape[0], tile[0]), _places(shape[1], tile[1])
        self._places = [(y, x) for y in self._rows for x in self._columns]
        self.count, self.area = len(self._places), tile[0] * tile[1]

    def shifted(self, i: int) -> Tiling:
        """As many tiles that lie elsewhere: each by itself, but for those at a side of the whole along that side.

        Moved by half a stride at most, rows of tiles share at least a stride of rows, and tiles of a row still touch:
        the whole stays covered. Where they go depends on i alone, so that an image can be generated again.
        """
        moved, random = Tiling(self._shape, self.tile), np.random.default_rng(i)
        moved._places = [(_moved(y, self._rows, random), _moved(x, self._columns, random)) for y, x in self._places]
        return moved

    def cut(self, whole: Float32, unit: int = 1) -> Iterator[Float32]:
        """The tiles, (B, C, h * unit, w * unit), of latents or pixels (B, C, rows * unit, columns * unit), float32.

        h and w are rows and columns of a tile.
        """
        height, width = (size * unit for size in self.tile)
        for y, x in self._places:
            yield whole[:, :, y * unit : y * unit + height, x * unit : x * unit + width]

    def stack(self, whole: Float32) -> Float32:
        """The tiles of latents (B, C, rows, columns) as rows, (count * B, C, h, w) float32: the first tile's first."""
        return np.concatenate(list(self.cut(whole)))

    def join(self, tiles: Iterable[Float32], unit: int = 1) -> Float32:
        """Blend tiles into the whole, in the order of `cut`; one is held at a time.

        Args:
            tiles: (B, C, h * unit, w * unit) float32 each, latents or pixels.
            unit: array elements for each latent along height and width.
        """
        whole: Float32 | None = None
        weights = np.zeros((self._shape[0] * unit, self._shape[1] * unit), np.float32)
        rows, columns = (_window(size * unit) for size in self.tile)
        window = rows[:, None] * columns
        for (y, x), tile in zip(self._places, tiles, strict=True):
            if whole is None:
                whole = np.zeros((*tile.shape[:2], *weights.shape), np.float32)
            place = np.s_[y * unit : y * unit + len(rows), x * unit : x * unit + len(columns)]
            whole[(..., *place)] += window * tile
            weights[place] += window
        assert whole is not None
        whole /= weights
        return whole


def _places(size: int, tile: int) -> list[int]:
    """First rows of tiles: from 0 to `size` - `tile`, evenly, no further apart than the overlap allows."""
    span = size - tile
    steps = -(-span // max(int(tile * (1 - OVERLAP)), 1))
    return [round(span * i / steps) for i in range(steps + 1)] if steps else [0]


def _moved(place: int, places: list[int], random: np.random.Generator) -> int:
    """A place between the first and the last, moved by half a stride at most."""
    if place in (places[0], places[-1]):
        return place
    stride = min(b - a for a, b in pairwise(places))
    return place + int(random.integers(stride)) - stride // 2


def _window(size: int) -> Float32:
    """Weights that rise and fall as the square of a sine, above zero everywhere: (size,) float32."""
    return (np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2).astype(np.float32)
