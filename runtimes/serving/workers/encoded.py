"""Requests, results and errors as messages carry them: JSON, and arrays beside it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.codec.pixels import open_image, open_mask, to_pil
from runtimes.errors import (
    BundleError,
    CancelledError,
    DeployError,
    InputError,
    OutOfMemoryError,
    ParityError,
    UnavailableError,
)
from runtimes.inputs.request import Request
from runtimes.serving.engine.contract import Generated
from runtimes.serving.engine.ticket import Progress
from runtimes.serving.workers.channel import DTYPES, Message, ProtocolError

if TYPE_CHECKING:
    from PIL.Image import Image

Arrays = list[NDArray[Any]]
ERRORS = {kind.__name__: kind for kind in (BundleError, DeployError, InputError, OutOfMemoryError, ParityError,
                                           UnavailableError)}
PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
                "I;16", "I;16L", "I;16B")
MOST_PIXELS = 64_000_000  # as `runtimes.codec.pixels` allows
ARRAYS = ("image", "mask")


def encoded_request(request: Request) -> tuple[dict[str, Any], Arrays]:
    """The fields of a request that are not their defaults, JSON-able, and what they refer to by number.

    Every array keeps its shape and dtype; pixels of Pillow images are bytes, (n,) uint8.
    Files that it names are read now: the worker may be on another machine.

    Raises:
        InputError: an image that cannot be used.
    """
    fields: dict[str, Any] = {}
    arrays: Arrays = []
    for declared in dataclasses.fields(request):
        value = getattr(request, declared.name)
        if value is declared.default:
            continue
        if declared.name in ARRAYS:
            several = isinstance(value, Sequence) and not isinstance(value, str)
            parts = [_encoded_image(one, declared.name, arrays) for one in (value if several else [value])]
            fields[declared.name] = parts if several else parts[0]
        elif isinstance(value, np.ndarray):
            fields[declared.name] = _put(value, declared.name, arrays)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields[declared.name] = {name: part for name, part in dataclasses.asdict(value).items() if part is not None}
        else:
            fields[declared.name] = value
    return fields, arrays


def decoded_request(fields: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Request:
    """What `encoded_request` wrote; every array as it was, of any shape and dtype: pixels, latents or bytes.

    Raises:
        ProtocolError: an image that the message does not hold.
        InputError: a field that cannot be used.
    """
    values = dict(fields)
    for name in ARRAYS:
        if isinstance(given := values.get(name), list):
            values[name] = [_decoded_image(one, arrays) for one in given]
        elif given is not None:
            values[name] = _decoded_image(given, arrays)
    if values.get("latents") is not None:
        values["latents"] = _decoded_image(values["latents"], arrays)
    return Request.from_mapping(values, files=True)


def encoded_result(result: Generated) -> tuple[dict[str, Any], Arrays]:
    """Images as one array: pixels (B, H, W, 3) uint8 of Pillow images, else as they are."""
    pillow = isinstance(result.images, list)
    pixels = np.stack([np.asarray(image) for image in result.images]) if pillow else result.images
    return {"pillow": pillow, "digest": result.digest, "flagged": list(result.flagged), "seconds": result.seconds,
            "batch": result.batch, "work_seconds": result.work_seconds}, [pixels]


def decoded_result(message: Message) -> Generated:
    """What `encoded_result` wrote.

    Raises:
        ProtocolError: a field or array is missing or of another type.
    """
    if len(message.arrays) != 1 or message.arrays[0].ndim != 4:
        raise ProtocolError(f"{message.kind} holds no images")
    [pixels] = message.arrays
    flagged = message.get("flagged", list)
    if any(type(one) is not bool for one in flagged):
        raise ProtocolError(f"{message.kind} has flags that are none")
    if message.get("pillow", bool):
        if pixels.dtype != np.uint8 or pixels.shape[-1] != 3:
            raise ProtocolError(f"{message.kind} holds {pixels.dtype} {pixels.shape}, expected uint8 (B, H, W, 3)")
        images: Any = to_pil(pixels)
    else:
        images = pixels.copy()  # the caller's own, as in one process
    return Generated(images, message.get("digest", str), tuple(flagged), message.get("seconds", float),
                     message.get("batch", float), message.get("work_seconds", float))


def decoded_progress(message: Message) -> Progress:
    """A step, with its preview if the message holds one.

    Raises:
        ProtocolError: a field is missing, or the preview is none.
    """
    preview = message.arrays[0] if message.arrays else None
    if preview is not None and (preview.dtype != np.uint8 or preview.ndim != 4 or preview.shape[-1] != 3):
        raise ProtocolError(f"{message.kind} holds {preview.dtype} {preview.shape}, expected uint8 (B, h, w, 3)")
    return Progress(message.get("index", int), message.get("total", int), preview)


def encoded_error(error: BaseException) -> dict[str, Any]:
    """An error by the name of its nearest kind; of what is no error of ours, the type alone."""
    if isinstance(error, CancelledError):
        return {"error": "CancelledError", "taken": error.steps_taken, "total": error.total}
    if not isinstance(error, DeployError):
        return {"error": "DeployError", "what": f"a fault of the program: {type(error).__name__}", "where": "engine",
                "fix": "please report it, with the server's log"}
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS)
    return {"error": name, "what": error.what, "where": error.where, "fix": error.fix}


def decoded_error(message: Message) -> DeployError:
    """What `encoded_error` wrote.

    Raises:
        ProtocolError: no error of ours.
    """
    name = message.get("error", str)
    if name == "CancelledError":
        return CancelledError(message.get("taken", int), message.get("total", int))
    if name not in ERRORS:
        raise ProtocolError(f"{name!r:.60} is no error")
    return ERRORS[name](message.get("what", str), where=message.get("where", str), fix=message.get("fix", str))


def _put(array: NDArray[Any], where: str, arrays: Arrays) -> dict[str, Any]:
    if array.dtype.name not in DTYPES:
        raise InputError(f"an array of {array.dtype}", where=where, fix="float32, or uint8 for a mask")
    arrays.append(array)
    return {"array": len(arrays) - 1}


def _encoded_image(value: Any, where: str, arrays: Arrays) -> dict[str, Any]:
    if isinstance(value, str | os.PathLike):
        value = (open_image if where == "image" else open_mask)(value, where)
    if isinstance(value, np.ndarray):
        return _put(value, where, arrays)
    opened: Image = value
    if getattr(opened, "mode", None) not in PILLOW_MODES:
        raise InputError(f"{type(value).__name__} is not an image that can be sent", where=where,
                         fix="give a Pillow image of mode RGB, a path or an array")
    described = _put(np.frombuffer(opened.tobytes(), np.uint8), where, arrays)
    described |= {"mode": opened.mode, "size": list(opened.size)}
    if opened.palette is not None and opened.mode in ("P", "PA"):
        described["palette"] = list(opened.palette.tobytes()), opened.palette.mode
    return described


def _decoded_image(described: Any, arrays: Sequence[NDArray[Any]]) -> Any:
    from PIL import Image

    try:
        array = arrays[_index(described["array"], len(arrays))]
        if "mode" not in described:
            return array
        width, height = (_index(side, MOST_PIXELS) for side in described["size"])
        if described["mode"] not in PILLOW_MODES or width * height > MOST_PIXELS:
            raise ValueError("no such image")
        image = Image.frombytes(described["mode"], (width, height), array.tobytes())
        if "palette" in described:
            colours, mode = described["palette"]
            image.putpalette(bytes(colours), mode)
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError("an image of a request is not as its message describes it") from error
    return image


def _index(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise ValueError(f"{value!r} is out of range")
    return value
