"""Reads images and masks by the rules of diffusers' `VaeImageProcessor` (image_processor.py), and turns them to pixels.

Files are read as `diffusers.utils.load_image` reads them: turned upright by EXIF, converted to RGB, which drops alpha
and clips 16 bits. What a caller holds in memory is taken as diffusers' pipelines take it: neither turned nor converted.
Pillow is imported when used.
"""

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
Opened: TypeAlias = Union["Image", NDArray[Any]]
MAX_PIXELS = 64_000_000


def open_image(source: ImageLike, where: str = "image") -> Opened:
    """An image, checked and otherwise as it is; files become RGB.

    Args:
        source: a path, a Pillow image of three bands, or pixels (H, W, 3) of any floating-point dtype in 0..1.
        where: what to call it in errors.

    Raises:
        InputError: unreadable, truncated, empty, of more than 64 million pixels, or not of three channels.
    """
    image = _opened(source, where)
    if isinstance(image, np.ndarray):
        return _checked_array(image, where)
    if len(image.getbands()) != 3:  # upstream fails later, or takes four bands for latents
        raise InputError(f"the image's mode is {image.mode}, expected RGB", where=where,
                         fix='image.convert("RGB"), or the path of its file')
    return image


def open_mask(source: ImageLike, where: str = "mask") -> Opened:
    """A mask, checked and otherwise as it is; files become RGB.

    Args:
        source: a path, a Pillow image of any mode, or pixels (H, W) or (H, W, 1), uint8 or of a floating-point dtype.
        where: what to call it in errors.

    Raises:
        InputError: as `open_image`.
    """
    mask = _opened(source, where)
    if not isinstance(mask, np.ndarray):
        return mask
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[:, :, 0]
    if mask.ndim != 2 or 0 in mask.shape:
        raise InputError(f"an array of shape {mask.shape} is not a mask", where=where, fix="give (H, W)")
    if mask.dtype != np.uint8 and not _is_float(mask):
        raise InputError(f"a mask of {mask.dtype}, expected uint8 or float", where=where, fix="mask.astype(np.float32)")
    if not np.isfinite(mask).all():
        raise InputError("the mask holds NaN or infinity", where=where)
    return mask


def size_of(image: Opened) -> tuple[int, int]:
    """Height and width in pixels of an image or mask, (H, W) or (H, W, 3) of any dtype where it is an array."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def to_pixels(image: Opened, height: int, width: int) -> NDArray[np.float32]:
    """An image at a size, Pillow's by Lanczos and arrays by the nearest pixel: (3, height, width) float32 in -1..1."""
    if isinstance(image, np.ndarray):
        pixels = _nearest(image, height, width)
    else:
        pixels = np.asarray(_resized(image, height, width)).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * pixels - 1).astype(np.float32).transpose(2, 0, 1))


def to_mask(mask: Opened, height: int, width: int) -> NDArray[np.float32]:
    """A mask at a size, 1 where an image is painted anew: (1, height, width) float32 of 0 and 1.

    A Pillow image is resized in its own mode, then grey, and 1 where at least half white; an array is 1 from 0.5 on.
    Its shape need not be the image's: both are stretched to the same height and width.

    Raises:
        InputError: Pillow cannot make it grey.
    """
    if isinstance(mask, np.ndarray):
        return np.ascontiguousarray(_nearest(mask, height, width) >= 0.5, np.float32)[None]
    try:
        grey = _resized(mask, height, width).convert("L")
    except ValueError as error:
        raise InputError(f"the mask cannot be made grey: {error}", where="mask", fix='give one of mode "L"') from error
    return (np.asarray(grey)[None] >= 127.5).astype(np.float32)


def to_pil(pixels: NDArray[np.uint8]) -> list[Image]:
    """Pixels (B, H, W, 3) uint8 as Pillow images."""
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]


def _opened(source: ImageLike, where: str) -> Opened:
    from PIL import Image, ImageOps

    if isinstance(source, np.ndarray):
        if source.ndim > 1 and source.shape[0] * source.shape[1] > MAX_PIXELS:
            raise _huge(where)
        return source
    if isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        with _file(Path(source)) as image:
            _load(image, where)
            if isinstance(image.info.get("transparency"), bytes):
                del image.info["transparency"]  # of a palette: Pillow would warn that RGB has none
            try:
                return ImageOps.exif_transpose(image).convert("RGB")
            except (OSError, ValueError, SyntaxError) as error:
                raise _unreadable(error, where) from error
    if isinstance(source, Image.Image):
        _load(source, where)
        return source
    raise InputError(f"{type(source).__name__} is not an image", where=where, fix="give a path or a Pillow image")


def _file(path: Path) -> Image:
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
        raise _unreadable(error, str(path)) from error


def _load(image: Image, where: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _huge(where)
    if not image.width or not image.height:
        raise InputError("the image is empty", where=where)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(error, where) from error


def _checked_array(array: NDArray[Any], where: str) -> NDArray[Any]:
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"an array of shape {array.shape} is not an image", where=where, fix="give (H, W, 3)")
    if not _is_float(array):  # upstream takes 255 for 255 times white
        raise InputError(f"an image of {array.dtype}, expected floats in 0..1", where=where,
                         fix="image / np.float32(255), or PIL.Image.fromarray(image)")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError("the image's numbers are not all in 0..1", where=where)
    return array


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype in (np.float16, np.float32, np.float64)


def _resized(image: Image, height: int, width: int) -> Image:
    from PIL import Image

    return image.resize((width, height), Image.Resampling.LANCZOS)


def _nearest(array: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(H, W, ...) at another size, as `torch.nn.functional.interpolate` picks rows and columns."""
    precise = array.dtype == np.float64
    rows, columns = (_picked(*sizes, precise) for sizes in zip(array.shape[:2], (height, width), strict=True))
    return array[rows][:, columns]


def _picked(source: int, target: int, precise: bool) -> NDArray[np.intp]:
    """Which of `source` places each of `target` takes: ATen's nearest_idx (native/UpSample.h), in the arithmetic of the
    numbers that are moved."""
    if target == 2 * source:
        return np.arange(target) // 2
    kind = np.dtype(np.float64 if precise else np.float32)
    places = np.arange(target).astype(kind) * (np.array([source], kind) / np.array([target], kind))
    return np.minimum(np.floor(places).astype(np.intp), source - 1)


def _huge(where: str) -> InputError:
    return InputError(f"the image has more than {MAX_PIXELS:,} pixels", where=where, fix="make it smaller first")


def _unreadable(error: Exception, where: str) -> InputError:
    return InputError(f"cannot read the image: {error}", where=where, fix="save it again as PNG or JPEG")
