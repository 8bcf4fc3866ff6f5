"""Pictures in and out: whatever a user has becomes RGB pixels, arrays become pictures. Pillow is imported when used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = Union["Image", NDArray[Any], str, "os.PathLike[str]"]
MAX_PIXELS = 64_000_000


def open_image(source: ImageLike, where: str = "image") -> Image:
    """Anything that is a picture as an upright RGB image; transparent parts become white.

    Args:
        source: a Pillow image, a path, or an array (H, W), (H, W, 3) or (H, W, 4), uint8 or float in 0..1.

    Raises:
        InputError: unreadable, truncated, empty, or of more than 64 million pixels.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _flattened(_from_array(source, where))
    if isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        with _opened(Path(source)) as image:
            return _upright_rgb(image, where)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, where)
    raise InputError(f"{type(source).__name__} is not an image", where=where, fix="give a path or a Pillow image")


def to_pixels(image: Image, height: int, width: int) -> NDArray[np.float32]:
    """An RGB image resized with Lanczos as diffusers does: (3, height, width) float32 in -1..1."""
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8).astype(np.float32) / 255.0
    return np.ascontiguousarray((2.0 * pixels - 1.0).transpose(2, 0, 1))


def to_mask(mask: Image, image: Image | None, height: int, width: int) -> NDArray[np.float32]:
    """A mask as diffusers reads it: greyscale, resized, 1 where it is at least half white: (1, height, width) float32.

    Args:
        mask: an RGB image; white is painted anew.
        image: what it lies over, which it must have the shape of; its resolution may be another.
        height, width: pixels.

    Raises:
        InputError: a mask of another shape than the image.
    """
    from PIL import Image

    if image is not None and abs(mask.width * image.height / image.width - mask.height) > 1:
        raise InputError(f"the mask is {mask.width}x{mask.height}, which cannot lie over an image of "
                         f"{image.width}x{image.height}", where="mask", fix="crop it to the image's shape")
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(mask.convert("L"), np.uint8)[None] >= 127.5).astype(np.float32)


def to_pil(pixels: NDArray[np.uint8]) -> list[Image]:
    """(B, H, W, 3) uint8 as Pillow images."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pixels]


def _opened(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise InputError("no such image", where=str(path))
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise InputError("not an image that Pillow can read", where=str(path), fix="save it as PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _huge(str(path)) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read the image: {error}", where=str(path)) from error


def _upright_rgb(image: Image, where: str) -> Image:
    from PIL import ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise _huge(where)
    if not image.width or not image.height:
        raise InputError("the image is empty", where=where)
    try:
        image.load()
        return _flattened(_eight_bits(ImageOps.exif_transpose(image)))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read the image: {error}", where=where, fix="save it again as PNG or JPEG") from error


def _eight_bits(image: Image) -> Image:
    """16- and 32-bit greyscale scaled to 8 bits; Pillow's own conversion clips it."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        full = 1.0 if values.max() <= 1 else 255.0
    else:
        full = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
    scaled = np.clip(values / full, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _flattened(image: Image) -> Image:
    """RGB, laid on white where it is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_array(array: NDArray[Any], where: str) -> Image:
    from PIL import Image

    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise InputError(f"an array of shape {array.shape} is not an image", where=where,
                         fix="give (H, W, 3), uint8 or float in 0..1")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _huge(where)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("the image's numbers are not all in 0..1", where=where)
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"an image of {array.dtype}, expected uint8 or float", where=where)
    return Image.fromarray(np.ascontiguousarray(array))


def _huge(where: str) -> InputError:
    return InputError(f"the image has more than {MAX_PIXELS:,} pixels", where=where, fix="make it smaller first")
