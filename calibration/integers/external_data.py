"""Reads weights that lie in a file beside a graph.

onnx_ir refuses files with several hard links, which bundles are made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def array_of(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """The weights of a tensor, of its shape and dtype; those in a file are mapped, not read."""
    if not isinstance(tensor, ir.ExternalTensor) or not tensor.size:
        return tensor.numpy()
    return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))


def make_writable(model: ir.Model) -> None:
    """Let the initializers be written to another file, one at a time. In place; their own files must stay."""
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = _lazy(tensor, name)


def _lazy(tensor: ir.ExternalTensor, name: str) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.Tensor(array_of(tensor), dtype=tensor.dtype, name=name), tensor.dtype,
                         ir.Shape(tensor.shape.numpy()), name=name)
