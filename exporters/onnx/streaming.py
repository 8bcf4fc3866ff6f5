"""Traces networks without reading their weights, which then go from the source's files to the graph's one by one.

Imports torch and onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from exporters.onnx.stored_weights import StoredWeight, lazy
from exporters.source.networks import empty_module, filled
from runtimes.bundle.safetensors_reader import read_header
from runtimes.errors import DeployError, InputError

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}


def unread_module(folder: Path, library: str, class_name: str) -> tuple[torch.nn.Module, dict[int, StoredWeight]]:
    """A component to be traced: its parameters have addresses and no contents.

    The allocations are never touched, so the kernel gives them no memory; tracing looks at shapes and dtypes alone.

    Args:
        folder: holds config.json and the weights.
        library, class_name: as in model_index.json.

    Returns:
        the module, float32, in eval mode; and where the contents of each parameter are, by the parameter's `data_ptr`.

    Raises:
        InputError: as `exporters.source.networks.empty_module`.
    """
    module, places = empty_module(folder, library, class_name)
    wanted, headers = module.state_dict(), {}
    unread: dict[str, torch.Tensor] = {}
    stored: dict[int, StoredWeight] = {}
    for name, place in places.items():
        if place.file not in headers:
            headers[place.file] = read_header(place.file), _data_start(place.file)
        header, start = headers[place.file]
        entry, shape = header[place.key], tuple(wanted[name].shape)
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{place.key} is stored as {entry['dtype']}, which cannot be read", where=str(place.file),
                             fix="save the model again as float32, float16 or bfloat16")
        dtype = torch.float32 if wanted[name].is_floating_point() else wanted[name].dtype
        unread[name] = torch.empty(shape, dtype=dtype)
        stored[unread[name].data_ptr()] = StoredWeight(
            place.file, start + entry["data_offsets"][0], _DTYPES[entry["dtype"]], shape, dtype.is_floating_point)
    return filled(module, unread), stored


def _data_start(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def attach_weights(model: ir.Model, stored: Mapping[int, StoredWeight]) -> None:
    """Replace the unread parameters of a traced graph by tensors that are read from their files when asked for.

    Raises:
        DeployError: something was computed from a parameter while tracing, or a parameter is read in part.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if not isinstance(raw, torch.Tensor) or tensor is None:
            continue
        weight = stored.get(raw.untyped_storage().data_ptr())
        if weight is None:
            continue
        if tuple(raw.shape) != weight.shape:
            raise DeployError(f"{value.name} is read in part, which cannot be streamed", where=str(weight.file))
        value.const_value = lazy(value.name or "", tensor.dtype, weight)
