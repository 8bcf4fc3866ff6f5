"""Reads what clients send: JSON without surprises, multipart forms in memory, images whose headers come first."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic_core
from PIL import Image, ImageOps
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from runtimes.serving.http.failures import HttpError
from runtimes.serving.state.order import opened

BodyType = TypeVar("BodyType", bound=BaseModel)
MOST_STRUCTURE = 5_000  # of [ { and , in a JSON body: more is no request of an image, and costs memory
MOST_FIELDS, MOST_FILES, MOST_FIELD_BYTES = 64, 4, 1 << 18
LARGE = 1 << 18  # bytes from which on a body is parsed in a thread
FORMATS = ("PNG", "JPEG", "WEBP")
JSON, FORM = "application/json", "multipart/form-data"
Files = dict[str, bytes]


async def json_body(request: Request, kind: type[BodyType]) -> BodyType:
    """A JSON body, checked.

    Raises:
        HttpError: 415: another type of body; 400: not JSON, NaN or infinity in it, or nested or branched beyond reason.
        ValidationError: a field that cannot be used.
    """
    _expect(request, JSON)
    content = await request.body()
    if len(content) < LARGE:
        return _parsed(content, kind)
    return await asyncio.to_thread(_parsed, content, kind)


def _parsed(content: bytes, kind: type[BodyType]) -> BodyType:
    if sum(map(content.count, (b"[", b"{", b","))) > MOST_STRUCTURE:
        raise HttpError(400, "the body has more lists, objects and members than any request here",
                        code="invalid_json")
    try:
        values = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise HttpError(400, "the body is no JSON object", code="invalid_json", fix='send {"prompt": "..."}')
    return kind.model_validate(values)


class _InMemory(MultiPartParser):
    """Never on disk: the size of the body is limited, and the file system may be read-only."""

    spool_max_size = 1 << 40


async def form_body(request: Request, kind: type[BodyType], files: tuple[str, ...]) -> tuple[BodyType, Files]:
    """A multipart form, checked: its fields, and the contents of its files.

    Args:
        request: whose body is read.
        kind: of the fields; texts become numbers and booleans.
        files: names that files may have; `NAME[]` is the same.

    Raises:
        HttpError: 415: another type of body; 400: broken, too many parts, or a file where none is expected.
        ValidationError: a field that cannot be used.
    """
    _expect(request, FORM)
    parser = _InMemory(request.headers, request.stream(), max_files=MOST_FILES, max_fields=MOST_FIELDS,
                       max_part_size=MOST_FIELD_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeDecodeError) as error:
        said = error.message if isinstance(error, MultiPartException) else "it cannot be read"
        raise HttpError(400, f"the form is broken: {said}", code="invalid_form") from error
    try:
        fields, contents = await _parts(form, files)
    finally:
        await form.close()
    return kind.model_validate(fields, strict=False), contents


async def _parts(form: FormData, files: tuple[str, ...]) -> tuple[dict[str, Any], Files]:
    fields: dict[str, Any] = {}
    contents: Files = {}
    for name, value in form.multi_items():
        plain = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            if plain not in files:
                raise HttpError(400, f"no file is expected as {name!r:.80}", code="unknown_field", where=plain)
            if plain in contents:
                raise HttpError(400, f"more than one file as {plain}: one image is edited at a time",
                                code="invalid_value", where=plain)
            contents[plain] = await value.read()
        elif plain in files:
            raise HttpError(400, f"{plain} is text", code="invalid_value", where=plain, fix="send it as a file")
        elif name.endswith("[]"):
            fields.setdefault(plain, []).append(value)
        elif name in fields:
            raise HttpError(400, f"{name!r:.80} is there twice", code="invalid_value", where=name)
        else:
            fields[name] = value
    return fields, contents


def _expect(request: Request, kind: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise HttpError(415, f"the body is of the type {given or 'none'!r:.80}", code="unsupported_media_type",
                        fix=f"send {kind}")


def from_base64(text: str, where: str) -> bytes:
    """The content of a base64 text or a data: URL.

    Raises:
        HttpError: 400: another URL, which is not fetched, or not base64.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise HttpError(400, f"the data: URL of {where} holds no base64", code="invalid_image", where=where)
    elif "://" in text[:16]:
        raise HttpError(400, f"{where} is a URL, and nothing is fetched here", code="invalid_image", where=where,
                        fix="send the image itself, in base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise HttpError(400, f"{where} is not base64", code="invalid_image", where=where) from error


def image_file(content: bytes, where: str, most_pixels: int) -> bytes:
    """An image as a request takes it: upright, RGB. Bytes that are so already stay as they are.

    The header is read first: what is too large is never decoded.

    Raises:
        HttpError: 400: no PNG, JPEG or WebP, too many pixels, or several frames.
        InputError: broken.
    """
    image = _looked_at(content, where, most_pixels)
    if image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1:
        return content
    return png(ImageOps.exif_transpose(image).convert("RGB"))


def mask_file(content: bytes, size_of: bytes, most_pixels: int) -> bytes:
    """OpenAI's mask, transparent where the image is painted anew, as a request takes it: white there, else black.

    Args:
        content: of the file.
        size_of: the image that it lies over.
        most_pixels: that it may have.

    Raises:
        HttpError: 400: no PNG or WebP with transparency, nothing transparent in it, or of another size than the image.
        InputError: broken.
    """
    mask = _looked_at(content, "mask", most_pixels)
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        raise HttpError(400, f"the mask has no transparency (its mode is {mask.mode})", code="invalid_mask",
                        where="mask", fix="make transparent what is to be painted anew, and save it as PNG")
    with Image.open(io.BytesIO(size_of)) as image:
        if mask.size != image.size:
            raise HttpError(400, f"the mask is {mask.width}x{mask.height}, the image {image.width}x{image.height}",
                            code="invalid_mask", where="mask", fix="give both the same size")
    painted = mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
    if painted.getextrema() == (0, 0):
        raise HttpError(400, "nothing of the mask is fully transparent: nothing would be painted anew",
                        code="invalid_mask", where="mask")
    return png(painted)


def mask_of_white(content: bytes, where: str, most_pixels: int) -> bytes:
    """A mask that is white where the image is painted anew, as A1111 has it, checked; grey stays grey."""
    return png(_looked_at(content, where, most_pixels).convert("L"))


def _looked_at(content: bytes, where: str, most_pixels: int) -> Image.Image:
    if not content:
        raise HttpError(400, f"{where} is empty", code="invalid_image", where=where)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height, frames = *header.size, getattr(header, "n_frames", 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(where, most_pixels) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise HttpError(400, f"{where} is not a PNG, JPEG or WebP image", code="invalid_image",
                        where=where) from error
    if width * height > most_pixels:
        raise _too_large(where, most_pixels)
    if frames > 1:
        raise HttpError(400, f"{where} is animated ({frames} frames)", code="invalid_image", where=where,
                        fix="send one frame")
    return opened(content, where)


def _too_large(where: str, most: int) -> HttpError:
    return HttpError(400, f"{where} has more than {most:,} pixels", code="image_too_large", where=where,
                     fix="make it smaller first")


def png(image: Image.Image) -> bytes:
    """An image as a PNG file, quickly written."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def form_schema(kind: type[BaseModel], files: Mapping[str, str], required: tuple[str, ...]) -> dict[str, Any]:
    """The OpenAPI schema of a multipart form: fields, and files with their descriptions."""
    schema = kind.model_json_schema()
    properties = {}
    for name, entry in schema["properties"].items():
        choices = [choice for choice in entry.pop("anyOf", ()) if choice.get("type") != "null"]
        entry.pop("default", None)
        properties[name] = (choices[0] | entry) if choices else entry
    for name, text in files.items():
        properties[name] = {"type": "string", "format": "binary", "description": text}
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": [*schema.get("required", ()), *required]}
