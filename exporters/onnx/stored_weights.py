"""Weights that stay in their files, and are read each time that a graph is written or a rewrite looks at them.

Imports onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a safetensors file or of a graph's external data.

    Attributes:
        offset: bytes from the start of the file.
        dtype: numpy dtype in the file.
        shape: that the reader gives it.
        widened: whether floating point is read as float32.
    """

    file: Path
    offset: int
    dtype: Any
    shape: tuple[int, ...]
    widened: bool = False

    def read(self) -> np.ndarray[Any, Any]:
        """The weight, `shape`, in the file's dtype or `widened` to float32: a copy, nothing of the file stays mapped.

        Returns:
            an array whose shape is `self.shape`.
        """
        array = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        return array.astype(np.float32, copy=False) if self.widened else array


def lazy(name: str, dtype: ir.DataType, weight: StoredWeight) -> ir.LazyTensor:
    """An initializer that is read anew each time it is looked at."""
    return ir.LazyTensor(lambda: ir.Tensor(weight.read(), dtype=dtype, name=name), dtype,
                         ir.Shape(list(weight.shape)), name=name)


def unmap(model: ir.Model) -> None:
    """Read external initializers piece by piece: memory-mapped, the whole file counts as resident once it was written.

    In place. The file must stay where it is for as long as the model is used.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
            continue
        weight = StoredWeight(Path(tensor.path), tensor.offset or 0, tensor.dtype.numpy(), tuple(tensor.shape.numpy()))
        value.const_value = lazy(value.name or "", tensor.dtype, weight)
