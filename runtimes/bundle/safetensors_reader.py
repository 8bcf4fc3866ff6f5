"""Reads safetensors files with numpy alone, for runtimes that have neither torch nor safetensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError

_MAX_HEADER = 100_000_000  # the safetensors format's own limit
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8,
           "F8_E5M2": np.uint8}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
             "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}


def _e4m3() -> np.ndarray[Any, Any]:
    """The 256 values of float8_e4m3fn (Micikevicius et al., arXiv 2209.05433): no infinity, one NaN of each sign."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    size[bits & 127 == 127] = np.nan
    found: np.ndarray[Any, Any] = np.where(bits < 128, size, -size).astype(np.float32)
    return found


_E4M3 = _e4m3()


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises:
        InputError: not a safetensors file, or shorter or longer than its header says.
    """
    size = file.stat().st_size
    again = "copy the file again"
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise InputError(f"truncated: {size} bytes, too short for a safetensors file", where=str(file), fix=again)
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER:
            raise InputError("not a safetensors file", where=str(file), fix=again)
        text = stream.read(length)
    if len(text) < length:
        raise InputError(f"truncated inside its header: {size} bytes", where=str(file), fix=again)
    try:
        header = json.loads(text)
        del text
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError("not a safetensors file: its header is damaged", where=str(file), fix=again) from error
    if size != 8 + length + end:
        kind = "truncated" if size < 8 + length + end else "damaged"
        raise InputError(f"{kind}: {size} bytes, its header says {8 + length + end}", where=str(file), fix=again)
    checked: dict[str, dict[str, Any]] = header
    return checked


def read_metadata(file: Path) -> dict[str, str]:
    """The strings that a safetensors file carries beside its tensors.

    Raises:
        InputError: as `read_header`.
    """
    read_header(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return {str(k): str(v) for k, v in (json.loads(stream.read(length)).get("__metadata__") or {}).items()}


def read_floats(file: Path, header: Mapping[str, Mapping[str, Any]], key: str) -> np.ndarray[Any, Any]:
    """One floating-point tensor, weights in the file's shape, as float32: a copy whose shape is the file's.

    Args:
        file: the safetensors file.
        header: from `read_header`.
        key: of the tensor.

    Raises:
        InputError: another type than float64, float32, float16, bfloat16, float8_e4m3fn or float8_e5m2.
    """
    if header[key]["dtype"] not in _DTYPES:
        raise InputError(f"{key} is {header[key]['dtype']}, expected floating point",
                         where=str(file), fix="save the file in float32")
    return _read(file, header[key], _DTYPES).astype(np.float32)


def read_number(file: Path, header: Mapping[str, Mapping[str, Any]], key: str) -> float:
    """The one number of a tensor of any shape, floating-point, integer or boolean: PyTorch's `item()`.

    Args:
        file: the safetensors file.
        header: from `read_header`.
        key: of the tensor.

    Raises:
        InputError: more than one number, none, or another type.
    """
    entry = header[key]
    if math.prod(entry["shape"]) != 1:
        raise InputError(f"{key} has the shape {tuple(entry['shape'])}, expected one number", where=str(file),
                         fix="get the file again")
    if entry["dtype"] not in _DTYPES | _INTEGERS:
        raise InputError(f"{key} is {entry['dtype']}, expected a number", where=str(file),
                         fix="save it as float32")
    return float(_read(file, entry, _DTYPES | _INTEGERS).reshape(()))


def _read(file: Path, entry: Mapping[str, Any], dtypes: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    shape = tuple(entry["shape"])
    array = np.fromfile(file, dtypes[entry["dtype"]], math.prod(shape), offset=8 + length + entry["data_offsets"][0])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif entry["dtype"] == "F8_E5M2":  # the upper half of a float16
        array = (array.astype(np.uint16) << 8).view(np.float16)
    elif entry["dtype"] == "F8_E4M3":
        array = _E4M3[array]
    return array.reshape(shape)
