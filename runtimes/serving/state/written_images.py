"""Generated images as the files that clients receive: PNG, JPEG or WebP, with how they were made, checked by policy.

The same images, order and policy give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtimes.errors import InputError
from runtimes.inputs import image_texts
from runtimes.serving.state.order import Order, sha256

if TYPE_CHECKING:
    from PIL.Image import Image

    from runtimes.inputs.request import Request
    from runtimes.serving.engine.contract import Generated

SAFETY = ("off", "flag", "replace")
# Level 4 takes half the time of zlib's default 6 for files at most 6 % larger; 1 takes a quarter, for 13 to 28 % more
# (reference model's images at 128 px, the same enlarged to 512 px, and those with grain; Pillow 13.0).
PNG_LEVEL = 4
FINE = 90  # from this quality on, JPEG keeps colours at full resolution
# Fields of a request that say how the files come about or that each image says for itself.
_NOT_SAID = ("prompt", "negative_prompt", "seed", "images_per_prompt", "output", "height", "width", "aspect")


@dataclass(frozen=True)
class WrittenImage:
    """One image as a file.

    Attributes:
        content: of the file.
        kind: "png", "jpeg" or "webp".
        sha256: of the content.
        seed: that it was made with.
        flagged: whether the model's safety checker flagged it and the policy looks at that.
    """

    content: bytes
    kind: str
    sha256: str
    seed: int
    flagged: bool = False


def written(generated: Generated, order: Order, *, safety: str = "flag", metadata: bool = True) -> list[WrittenImage]:
    """Images as files. Takes milliseconds of a core for each: an event loop calls it in a thread.

    Args:
        generated: with Pillow images.
        order: what they were made of, with the kind and compression of the files.
        safety: what is done with images that the safety checker flagged: "off" nothing, "flag" marks them, "replace"
            writes black ones in their place.
        metadata: whether files say how they were made; an order's own `metadata` may turn it off too.

    Raises:
        InputError: a policy that there is none of, or images that are arrays.
    """
    if safety not in SAFETY:
        raise InputError(f"unknown {safety!r}", where="safety", fix=f"one of {', '.join(SAFETY)}")
    request = order.request()
    if request.output != "pil":
        raise InputError(f"{request.output} are not written as image files", where="output", fix="leave it out")
    images: list[Image] = list(generated.images)
    looked_at = generated.flagged and safety != "off"
    flagged = generated.flagged if looked_at else (False,) * len(images)
    texts = _texts(request, order, generated.digest)
    files = []
    for image, flag, said in zip(images, flagged, texts, strict=True):
        replaced = flag and safety == "replace"
        if replaced:
            image, said = _black(image), {**said, "safety": "replaced"}
        said["size"] = f"{image.width}x{image.height}"
        content = encoded(image, order.output.kind, order.output.compression,
                          said if metadata and order.output.metadata else {})
        files.append(WrittenImage(content, order.output.kind, sha256(content), int(said["seed"]), flag))
    return files


def encoded(image: Image, kind: str, compression: int = 100, texts: Mapping[str, str] | None = None) -> bytes:
    """One image as the bytes of a file.

    Args:
        image: of mode RGB.
        kind: "png", "jpeg" or "webp".
        compression: quality of jpeg and webp, 0 to 100.
        texts: key to value, written as PNG text chunks or as EXIF.

    Raises:
        InputError: a kind that there is none of.
    """
    file = io.BytesIO()
    if kind == "png":
        image.save(file, "PNG", compress_level=PNG_LEVEL, pnginfo=image_texts.chunks(texts) if texts else None)
        return file.getvalue()
    options: dict[str, Any] = {"exif": image_texts.exif(texts)} if texts else {}
    if kind == "jpeg":
        image.save(file, "JPEG", quality=compression, subsampling=0 if compression >= FINE else 2, **options)
    elif kind == "webp":
        image.save(file, "WEBP", quality=compression, **options)
    else:
        raise InputError(f"unknown {kind!r}", where="output", fix="png, jpeg or webp")
    return file.getvalue()


def _texts(request: Request, order: Order, digest: str) -> list[dict[str, str]]:
    """What each file says: fields that were given, and which model and bundle; the others were left to defaults."""
    said = {name: str(value) for name, value in sorted(order.fields.items())
            if name not in _NOT_SAID and value is not None}
    sent = {name: " ".join(sha256(content) for content in contents) for name, contents in order.files.items()}
    common = {**said, **sent, "model": order.model, "bundle": digest}
    return image_texts.descriptions(request, common)


def _black(image: Image) -> Image:
    from PIL import Image as PillowImage

    return PillowImage.new("RGB", image.size)
