"""How an image was made, written into its file and read again: PNG text chunks, EXIF of JPEG and WebP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtimes.inputs.noise import resolve_seeds

if TYPE_CHECKING:
    from PIL.Image import Exif, Image
    from PIL.PngImagePlugin import PngInfo

    from runtimes.inputs.request import Request

SOFTWARE = "ldm-deploy"
EXIF_IFD, SOFTWARE_TAG, USER_COMMENT = 0x8769, 0x0131, 0x9286
ASCII = b"ASCII\0\0\0"  # how EXIF 2.3 says what a user comment is written in
MOST_EXIF = 65_000  # bytes of a JPEG's one EXIF segment, its header apart


def descriptions(request: Request, common: Mapping[str, str]) -> list[dict[str, str]]:
    """What each image of a request says: its own prompts and seed, and what all share; empty values are left out.

    Args:
        request: with its seeds resolved.
        common: key to value.
    """
    each = [(prompt, negative) for prompt, negative in zip(request.prompts, request.negative_prompts, strict=True)
            for _ in range(request.images_per_prompt)]
    seeds = resolve_seeds(request.seed, request.count)
    return [{"prompt": prompt, "seed": str(seed),
             **{key: value for key, value in {"negative_prompt": negative, **common, "software": SOFTWARE}.items()
                if value}}
            for (prompt, negative), seed in zip(each, seeds, strict=True)]


def chunks(texts: Mapping[str, str]) -> PngInfo:
    """International text chunks: prompts are not always Latin."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    return info


def exif(texts: Mapping[str, str]) -> Exif:
    """A user comment that holds the texts as JSON, in ASCII, which every reader takes.

    What is longer than a JPEG may hold is cut from its longest texts, whose keys `cut` lists.
    """
    from PIL.Image import Exif

    made, texts, cut = Exif(), dict(texts), list[str]()
    while len(comment := json.dumps(texts)) > MOST_EXIF:
        longest = max(texts, key=lambda key: len(json.dumps(texts[key])))
        texts[longest] = texts[longest][:len(texts[longest]) // 2]
        cut = sorted({*cut, longest})
        texts["cut"] = " ".join(cut)
    made[SOFTWARE_TAG] = SOFTWARE
    made.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + comment.encode()
    return made


def texts_of(image: Image) -> dict[str, str]:
    """What `chunks` or `exif` wrote into an opened image file; empty where nothing is."""
    if image.format == "PNG":
        image.load()  # chunks may come after the pixels
        found: Any = getattr(image, "text", {})
        return {str(key): str(value) for key, value in found.items()}
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(ASCII):
        return {}
    try:
        read = json.loads(comment.removeprefix(ASCII))
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in read.items()} if isinstance(read, dict) else {}
