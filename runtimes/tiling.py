"""Pictures larger than the networks were built for, from overlapping tiles that are blended smoothly.

Bar-Tal et al., MultiDiffusion, arXiv 2302.08113: at every step each tile is predicted on its own and the predictions
are averaged where tiles overlap, eq. 5 with weights that fall off towards a tile's border. The autoencoder's halves
are tiled and blended alike. A tile knows nothing of its neighbours but what the overlap says, so a prompt should
describe what may be anywhere. Tiles lie elsewhere at every step (as in Du et al., DemoFusion, arXiv 2311.16973,
section 3.4), so that no place of the picture is always at a border and none always in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
OVERLAP = 0.5


class Tiling:
    """Where tiles lie on a grid of latents, and how they are blended. Holds no picture.

    Attributes:
        count: number of tiles.
        area: latents of one tile.
    """

    def __init__(self, shape: tuple[int, int], tile: tuple[int, int]) -> None:
        """Spread tiles of latents evenly over a grid, neighbours sharing at least half of their rows or columns.

        Args:
            shape: rows and columns of the whole.
            tile: rows and columns of a tile, at most those of the whole.
        """
        self._shape, self._tile = shape, tile
        self._rows, self._columns = _places(shape[0], tile[0]), _places(shape[1], tile[1])
        self._places = [(y, x) for y in self._rows for x in self._columns]
        self.count, self.area = len(self._places), tile[0] * tile[1]

    def shifted(self, i: int) -> Tiling:
        """As many tiles that lie elsewhere: of each row, or of each column where i is odd, those between the first and
        the last are moved together, by Halton's points in bases 2 and 3.

        Every row takes the next point, so that borders of neighbours are not in line. Moved by half a stride at most,
        tiles still cover the whole.
        """
        moved = Tiling(self._shape, self._tile)
        if i % 2:
            moved._places = [(y, x) for n, x in enumerate(_moved(self._columns, _halton(i, 2)))
                             for y in _moved(self._rows, _halton(i + n, 3))]
        else:
            moved._places = [(y, x) for n, y in enumerate(_moved(self._rows, _halton(i, 2)))
                             for x in _moved(self._columns, _halton(i + n, 3))]
        return moved

    def cut(self, whole: Float32, unit: int = 1) -> Iterator[Float32]:
        """The tiles of an array (B, C, rows * unit, columns * unit), each (B, C, tile rows * unit, columns * unit)."""
        height, width = (size * unit for size in self._tile)
        for y, x in self._places:
            yield whole[:, :, y * unit : y * unit + height, x * unit : x * unit + width]

    def stack(self, whole: Float32) -> Float32:
        """The tiles as rows: (tiles * B, C, tile rows, tile columns), all of the first tile's images first."""
        return np.concatenate(list(self.cut(whole)))

    def join(self, tiles: Iterable[Float32], unit: int = 1) -> Float32:
        """Blend tiles into the whole, in the order of `cut`; one is held at a time.

        Args:
            tiles: (B, C, tile rows * unit, tile columns * unit) float32 each.
            unit: array elements for each latent along height and width.
        """
        whole: Float32 | None = None
        weights = np.zeros((self._shape[0] * unit, self._shape[1] * unit), np.float32)
        rows, columns = (_window(size * unit) for size in self._tile)
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


class Tiled:
    """A prediction of the whole from predictions of its tiles, all of which are rows of one call."""

    def __init__(self, predict: Callable[[Float32, float, int], Float32], tiling: Tiling,
                 layout: Callable[[int], int], extra: Float32 | None = None) -> None:
        """Wrap a U-Net whose rows are the tiles of `Tiling.stack`.

        Args:
            predict: (tiles, timestep, step) -> predictions of the tiles.
            tiling: of the whole.
            layout: step -> which layout it has; the same number where tiles must stay as they were in the step before.
            extra: (B, C', H/f, W/f) channels that the U-Net takes after the sample's own.
        """
        self._predict, self._tiling, self._layout, self._extra = predict, tiling, layout, extra

    def __call__(self, sample: Float32, timestep: float, i: int) -> Float32:
        """Predict: (B, C, H/f, W/f) float32 at step i in, the same out."""
        tiling = self._tiling.shifted(self._layout(i))
        if self._extra is not None:
            sample = np.concatenate([sample, self._extra], axis=1)
        return tiling.join(np.split(self._predict(tiling.stack(sample), timestep, i), tiling.count))


def _places(size: int, tile: int) -> list[int]:
    """First rows of tiles: from 0 to `size` - `tile`, evenly, no further apart than the overlap allows."""
    span = size - tile
    steps = -(-span // max(int(tile * (1 - OVERLAP)), 1))
    return [round(span * i / steps) for i in range(steps + 1)] if steps else [0]


def _moved(places: list[int], share: float) -> list[int]:
    """Places between the first and the last moved by `share` (0 to 1) of a stride less one half."""
    if len(places) < 3:
        return places
    stride = min(b - a for a, b in pairwise(places))
    distance = int(share * stride) - stride // 2
    return [places[0], *(place + distance for place in places[1:-1]), places[-1]]


def _halton(i: int, base: int) -> float:
    """Element i of the van der Corput sequence: the digits of i mirrored at the point."""
    result, unit = 0.0, 1.0
    while i:
        i, digit = divmod(i, base)
        unit /= base
        result += digit * unit
    return result


def _window(size: int) -> Float32:
    """Weights that rise and fall as the square of a sine, above zero everywhere: (size,) float32."""
    return (np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2).astype(np.float32)
