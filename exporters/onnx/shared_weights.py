"""Lets the step cache's graph refer to those of its weights that the file of the denoiser's own graph holds.

Imports onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from exporters.onnx.stored_weights import unmap
from runtimes.bundle.folder import translated_disk_errors

SMALLEST_BYTES = 1024  # below that a reference costs more than it saves
NEEDLE_BYTES = 256  # looked for first; the rest of a tensor is compared where they are found


@dataclass(frozen=True)
class SharedWeights:
    """What a graph reads from another's file.

    Attributes:
        tensors, bytes: that are shared.
        own_bytes: of the tensors that stay in the graph.
    """

    tensors: int
    bytes: int
    own_bytes: int


def move_weights_out(source: Path, destination: Path) -> None:
    """Write a graph with its weights in a file of their own, `destination`.data.

    Raises:
        UnavailableError: the disk is full.
    """
    with translated_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        model = ir.load(source)
        unmap(model)
        ir.save(model, destination, external_data=f"{destination.name}.data")


def share_weights(source: Path, store: Path, destination: Path) -> SharedWeights:
    """Write a graph that reads from `store` what is in there, byte by byte, and holds the rest itself.

    Args:
        source: ONNX file, with external weights beside it if it has any.
        store: weights of the other graph, an ONNX graph's external data or OpenVINO's .bin, in the folder of
            `destination`: ONNX Runtime reads no file outside of a graph's own folder.
        destination: ONNX file to write.

    Raises:
        UnavailableError: the disk is full.
    """
    model = ir.load(source)
    unmap(model)
    tensors = shared = own = 0
    with store.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            offset = _find(contents, tensor) if tensor.nbytes >= SMALLEST_BYTES else -1
            if offset < 0:
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                own += tensor.nbytes
                continue
            value.const_value = ir.ExternalTensor(store.name, offset, tensor.nbytes, tensor.dtype, name=name,
                                                  shape=ir.Shape(tensor.shape.numpy()), base_dir=store.parent)
            tensors, shared = tensors + 1, shared + tensor.nbytes
    with translated_disk_errors(destination):
        ir.save(model, destination)
    return SharedWeights(tensors, shared, own)


def _find(contents: mmap.mmap, tensor: ir.TensorProtocol) -> int:
    """Offset of a tensor's bytes, at a multiple of its element size, or -1."""
    wanted = tensor.tobytes()
    step = max(tensor.dtype.bitwidth // 8, 1)
    offset = contents.find(wanted[:NEEDLE_BYTES])
    while offset >= 0 and (offset % step or contents[offset : offset + len(wanted)] != wanted):
        offset = contents.find(wanted[:NEEDLE_BYTES], offset + 1)
    return offset
