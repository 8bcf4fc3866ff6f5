"""Turns what a client asked for into an `Order`: model, settings of the quality, a size it makes, within the limits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError, UnavailableError
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.http.failures import HttpError
from runtimes.serving.http.received import Files, image_file, mask_file
from runtimes.serving.http.schemas import QUALITIES, ImageBody
from runtimes.serving.http.service import Service
from runtimes.serving.state.order import Order, Output


def openai_order(service: Service, body: ImageBody, files: Files, owner: str) -> Order:
    """An order from a body of OpenAI's API or of jobs. It decodes files: call it in a thread where there are any.

    Raises:
        HttpError, InputError: what cannot be done, by its field.
    """
    model = service.model(body.model, owner)
    fields = {**_preset(model, body.quality or "auto"), **body.sampling()}
    checked = checked_files(service, files)
    fields |= _size(model, body, checked)
    fields.pop("aspect", None)
    kind = body.output_format or "png"
    if kind == "png" and body.output_compression not in (None, 100):
        raise HttpError(400, "png is written without loss", code="invalid_value", where="output_compression",
                        fix="leave it out, or ask for jpeg or webp")
    compression = 100 if body.output_compression is None else body.output_compression
    return order_of(service, model, fields, checked, Output(kind, compression, service.options.metadata))


def order_of(service: Service, model: ServedModel, fields: Mapping[str, Any], files: Mapping[str, bytes],
             output: Output) -> Order:
    """An order within the limits of the server, and of what the model makes.

    Raises:
        HttpError, InputError: what cannot be done, by its field.
    """
    check_limits(service, model, fields)
    if files and not model.edits:
        raise HttpError(400, f"{model.name} takes no image", code="invalid_value", where="image",
                        fix="serve a bundle with its image encoder")
    scheduler = fields.get("scheduler")
    if scheduler is not None and scheduler not in model.schedulers:
        raise HttpError(400, f"the scheduler {scheduler!r:.60} does not run over the noise schedule of {model.name}",
                        code="invalid_value", where="scheduler", fix=f"one of {', '.join(model.schedulers)}")
    if fields.get("prompt") and not model.takes_prompt:
        raise HttpError(400, f"{model.name} generates without prompts", code="invalid_value", where="prompt",
                        fix="send an empty prompt")
    return Order.of(model.name, fields, {name: (content,) for name, content in files.items()}, output)


def check_limits(service: Service, model: ServedModel, fields: Mapping[str, Any]) -> None:
    """Refuse more images, steps or pixels than the server allows.

    Raises:
        HttpError: 400, by the field.
    """
    options = service.options
    height, width = fields.get("height") or model.height, fields.get("width") or model.width
    for name, value, most in (("n", fields.get("images_per_prompt", 1), options.max_images),
                              ("num_inference_steps", fields.get("steps", DEFAULT_STEPS), options.max_steps),
                              ("size", height * width, options.max_pixels)):
        if value > most:
            what = f"{width}x{height} is {value:,} pixels" if name == "size" else f"{name} is {value}"
            raise HttpError(400, f"{what}, this server allows {most:,}", code="limit_exceeded", where=name)


def checked_files(service: Service, files: Files) -> Files:
    """Files of a client, OpenAI's meaning of the mask turned to ours.

    Raises:
        HttpError, InputError: no image, too large, or an image and mask that do not go together.
    """
    most = service.options.max_pixels
    checked: Files = {}
    if "image" in files:
        checked["image"] = image_file(files["image"], "image", most)
    if "mask" in files:
        if "image" not in files:
            raise HttpError(400, "a mask without an image", code="invalid_value", where="mask",
                            fix="send the image that it lies over")
        checked["mask"] = mask_file(files["mask"], files["image"], most)
    return checked


def check_size(model: ServedModel, height: int, width: int, where: str = "size") -> None:
    """Refuse a size that a bundle does not make.

    Raises:
        HttpError: 400 with the nearest sizes.
    """
    near = [_nearest(pixels, *limits) for pixels, limits in ((height, model.heights), (width, model.widths))]
    if [height] == near[0] and [width] == near[1]:
        return
    sizes = sorted({f"{w}x{h}" for h in near[0] for w in near[1]}, key=lambda s: [int(p) for p in s.split("x")])
    raise HttpError(400, f"{width}x{height} is no size that {model.name} makes", code="invalid_size", where=where,
                    fix=f"nearest: {', '.join(sizes)}")


def _preset(model: ServedModel, quality: str) -> dict[str, Any]:
    """Settings of a quality; a quality that was not measured is the client's to change, not a fault of the server."""
    try:
        return dict(model.preset(QUALITIES[quality]))
    except UnavailableError as error:
        raise InputError(error.what, where="quality", fix=error.fix) from error


def _size(model: ServedModel, body: ImageBody, files: Files) -> dict[str, Any]:
    if body.size not in (None, "auto"):
        if body.aspect is not None:
            raise HttpError(400, "both an aspect and a size are given", code="invalid_value", where="aspect",
                            fix="give one of them")
        width, height = (int(part) for part in str(body.size).split("x"))
        if body.tile is None:  # tiles are how a bundle makes sizes beyond its own
            check_size(model, height, width)
        return {"height": height, "width": width}
    if body.aspect is not None:
        height, width = model.size_of(body.aspect)
        return {"height": height, "width": width}
    if "image" in files:
        with Image.open(io.BytesIO(files["image"])) as image:
            width, height = image.size
        try:
            check_size(model, height, width)
        except HttpError:
            height, width = model.size_of(f"{width}:{height}")
        return {"height": height, "width": width}
    return {"height": model.height, "width": model.width}


def _nearest(pixels: int, span: ShapeRange, multiple: int) -> list[int]:
    """The one below and the one above, within the range; one where it fits."""
    steps = (pixels // multiple * multiple, -(-pixels // multiple) * multiple)
    least, most = -(-span.min // multiple) * multiple, span.max // multiple * multiple
    return sorted({min(max(step, least), most) for step in steps})
