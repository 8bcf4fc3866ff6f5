"""Arithmetic of weights as symmetric 8-bit integers with a scale for each output channel.

Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, arXiv 1806.08342.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.integers.external_data import array_of

STORED_LIMIT = 127  # of weights that are only stored as integers: nothing sums their products


def weight_scale(weight: NDArray[Any], axis: int, limit: int) -> NDArray[np.float32]:
    """Scale of each output channel, (channels,) float32: the channel's largest magnitude is the integer `limit`.

    Args:
        weight: of any shape and floating-point dtype.
        axis: of the output channels.
        limit: largest integer, 127 or less.
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    scale: NDArray[np.float32] = np.maximum(np.abs(weight).max(axis=others) / limit, 1e-10).astype(np.float32)
    return scale


def to_integers(weight: NDArray[Any], scale: NDArray[np.float32], axis: int, limit: int) -> NDArray[np.int8]:
    """The weight's integers, int8 in its shape, -limit to limit; times `scale` along `axis` they are the weight.

    Args:
        weight: of any shape and floating-point dtype.
        scale: (channels,) float32.
        axis: of the output channels.
        limit: largest integer.
    """
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    integers: NDArray[np.int8] = np.clip(np.round(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    return integers


def lazy_integers(weight: ir.TensorProtocol, scale: NDArray[np.float32], axis: int, limit: int, name: str,
                  ) -> ir.TensorProtocol:
    """The integers of a weight as `to_integers` has them, int8 in its shape, converted when they are written.

    Args:
        weight: of any shape and floating-point dtype.
        scale: (channels,) float32.
        axis, limit: as of `to_integers`.
        name: of the result.
    """
    def convert() -> ir.TensorProtocol:
        return ir.Tensor(to_integers(array_of(weight), scale, axis, limit), name=name)

    return ir.LazyTensor(convert, ir.DataType.INT8, ir.Shape(weight.shape.numpy()), name=name)


class Integers:
    """Weights of one graph converted once, for the many graphs that a search makes of it.

    Args:
        folder: that the graphs are written in: each refers to the files here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, tuple[ir.ExternalTensor, NDArray[np.float32]]] = {}

    def of(self, weight: ir.TensorProtocol, axis: int, limit: int, name: str,
           ) -> tuple[ir.TensorProtocol, NDArray[np.float32]]:
        """Integers, int8 in the weight's shape, and (channels,) float32 scales.

        Args:
            weight: of any shape and floating-point dtype.
            axis, limit: as of `to_integers`.
            name: identifies the weight and the limit.
        """
        if name not in self._found:
            values = array_of(weight)
            scale = weight_scale(values, axis, limit)
            integers = to_integers(values, scale, axis, limit)
            location = f"{len(self._found)}.int8"
            integers.tofile(self.folder / location)
            tensor = ir.ExternalTensor(location, 0, integers.nbytes, ir.DataType.INT8, shape=ir.Shape(integers.shape),
                                       name=name, base_dir=self.folder)
            self._found[name] = tensor, scale
        return self._found[name]
