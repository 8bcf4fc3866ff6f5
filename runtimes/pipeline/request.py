"""What a caller asks of a pipeline, checked as a whole before any work and spread out to one entry per image."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import Described, input_spec
from runtimes.backends.session import Session
from runtimes.bundle.manifest import PipelineFacts
from runtimes.bundle.tensors import ShapeRange
from runtimes.codec.pixels import ImageLike, Opened, open_image, open_mask, size_of, to_mask, to_pixels
from runtimes.codec.tiling import Tiling
from runtimes.errors import BundleError, InputError
from runtimes.pipeline.noise import resolve_seeds
from runtimes.text.clip_tokenizer import check_text

OUTPUTS = ("pil", "numpy", "latents")
MAX_TILED_SIDE, LARGEST_SIDE = 8192, 1 << 31  # the second only keeps numbers sane: the axes have ranges
MOST = 10_000  # of steps, images and whatever else is counted: more is a slip of the pen, and takes all memory


@dataclass(frozen=True)
class Request:
    """A checked call. Everything per image has one entry for each of the B images.

    Attributes:
        prompts, negatives: texts; `negatives` is empty where guidance is off.
        negatives_given: whether the negative prompts were given, though they be empty texts.
        latent_shape: (C, H/f, W/f).
        height, width: pixels.
        tiling: where the networks' tiles lie, or None where they take the whole.
        images: distinct initial images, (K, 3, H, W) float32 in -1..1, or None for text to image.
        image_of: index into `images` for every image.
        strength: share of the schedule that initial images go through; 1 starts from noise alone under a mask.
        masks: distinct masks, (M, 1, H, W) float32, 1 where an image is painted anew, or None.
        mask_of: index into `masks` for every image.
        latents: given initial noise, (B, C, H/f, W/f) float32 of unit variance, or None to sample it.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    negatives_given: bool
    latent_shape: tuple[int, int, int]
    height: int
    width: int
    tiling: Tiling | None
    seeds: tuple[int, ...]
    images: NDArray[np.float32] | None
    image_of: tuple[int, ...]
    strength: float
    masks: NDArray[np.float32] | None
    mask_of: tuple[int, ...]
    latents: NDArray[np.float32] | None


def check_request(
    sessions: Mapping[str, Session], facts: PipelineFacts, *, prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None, images_per_prompt: int, guided: bool,
    seed: int | Sequence[int] | None, height: int | None, width: int | None,
    image: ImageLike | Sequence[ImageLike] | None, mask: ImageLike | Sequence[ImageLike] | None, strength: float,
    latents: NDArray[np.float32] | None, tile: int | None,
) -> Request:
    """Check a call's arguments; see `Pipeline.__call__` for their meaning.

    Raises:
        InputError: the first argument that cannot be used.
    """
    prompts = _texts(prompt, "the prompt")
    if not prompts:
        raise InputError("no prompt", where="prompt", fix="give at least one; it may be an empty string")
    copies = whole(images_per_prompt, "images_per_prompt", MOST // len(prompts))
    if not facts.text_encoders and any(prompts):
        raise InputError("this model generates without prompts", where="prompt", fix="leave the prompt empty")
    negatives = _texts("" if negative_prompt is None else negative_prompt, "the negative prompt")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise InputError(f"{len(negatives)} negative prompts for {len(prompts)} prompts", where="negative_prompt",
                         fix="give one, or one per prompt")
    count = len(prompts) * copies
    images = [] if image is None else _opened_all(image, open_image, "image", count)
    masks = [] if mask is None else _opened_all(mask, open_mask, "mask", count)
    if masks and not images:
        raise InputError("a mask without an image", where="mask", fix="give the image that it lies over")
    if len({len(images), len(masks)} - {0, 1}) > 1:
        raise InputError(f"{len(masks)} masks for {len(images)} images", where="mask", fix="give one, or one each")
    # As diffusers has it, an image sets the size of what is made of it, but not of what is painted into it.
    height, width = _size(facts, sessions, height, width, None if masks or not images else size_of(images[0]),
                          latents, tile)
    shape = facts.latent_channels, height // facts.vae_scale_factor, width // facts.vae_scale_factor
    return Request(
        prompts=_repeated(prompts, copies),
        negatives=_repeated(negatives, copies) if guided else (),
        negatives_given=negative_prompt is not None,
        latent_shape=shape,
        height=height,
        width=width,
        tiling=None if tile is None else _tiling(facts, sessions, height, width, tile),
        seeds=resolve_seeds(seed, count),
        images=np.stack([to_pixels(p, height, width) for p in images]) if images else None,
        image_of=_dealt(len(images), count),
        strength=strength,
        masks=np.stack([to_mask(m, height, width) for m in masks]) if masks else None,
        mask_of=_dealt(len(masks), count),
        latents=None if latents is None else check_latents(latents, (count, *shape)),
    )


def check_latents(latents: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Refuse latents of another type or shape, or with numbers that are not finite.

    Raises:
        InputError: naming what was expected.
    """
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.shape != shape:
        found = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__
        raise InputError(f"the latents are {found}, expected float32 {shape}", where="latents",
                         fix="(images, channels, height / f, width / f), unit variance")
    if not np.isfinite(latents).all():
        raise InputError("the latents hold NaN or infinity", where="latents")
    return latents


def check_size(facts: PipelineFacts, sessions: Mapping[str, Session], name: str, pixels: int) -> int:
    """Refuse a height or width that the networks do not take.

    Raises:
        InputError: not a multiple, or outside the range that the bundle was built for.
    """
    limits, multiple = pixel_limits(facts, sessions, name)
    pixels = whole(pixels, name, LARGEST_SIDE)
    if pixels % multiple or pixels not in limits:
        steps = f" in steps of {multiple}" if limits.min < limits.max else ""
        near = sorted({min(max(p, limits.min), limits.max)
                       for p in (pixels // multiple * multiple, -(-pixels // multiple) * multiple)})
        raise InputError(f"{name} is {pixels}, the bundle makes {limits.min} to {limits.max}{steps}", where=name,
                         fix=f"nearest: {' or '.join(map(str, near))}; other sizes need a rebuild with --shapes")
    return pixels


def pixel_limits(facts: PipelineFacts, sessions: Mapping[str, Described], name: str) -> tuple[ShapeRange, int]:
    """The range of a height or width in pixels, and what it must be a multiple of: the U-Net's and decoder's alike."""
    position = {"height": 2, "width": 3}[name]
    least, most, multiple = 1, 1 << 20, 1
    for component, tensor in (("unet", "sample"), ("vae_decoder", "latent_sample")):
        shape = input_spec(sessions[component], tensor).shape
        if len(shape) != 4:
            raise BundleError(f"{tensor} has the shape {shape}, expected (B, C, H/f, W/f)", where=component,
                              fix="build the bundle again")
        size = shape[position]
        if isinstance(size, int):
            least, most = max(least, size), min(most, size)
        elif (axis := sessions[component].component.axes.get(size)) is not None:
            least, most = max(least, axis.range.min), min(most, axis.range.max)
            multiple = math.lcm(multiple, axis.multiple)
    least, most = -(-least // multiple) * multiple, most // multiple * multiple
    if least > most:
        raise InputError(f"U-Net and decoder have no {name} in common", where=name, fix="build the bundle again")
    factor = facts.vae_scale_factor
    return ShapeRange(least * factor, least * factor, most * factor), multiple * factor


def whole(value: object, where: str, most: int = MOST) -> int:
    """A whole number from 1 to `most`.

    Raises:
        InputError: anything else.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{where} is {value!r:.60}, expected a whole number from 1 on", where=where)
    if number > most:
        raise InputError(f"{where} is {number:.3g}, expected at most {most:,}", where=where)
    return number


def finite(value: Any, where: str) -> float:
    """A finite number.

    Raises:
        InputError: NaN, infinity, or not a number.
    """
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} is {value!r}, expected a finite number", where=where)
    return number


def interval(value: Any, where: str) -> tuple[float, float]:
    """Two finite numbers.

    Raises:
        InputError: anything else.
    """
    try:
        first, last = value
    except (TypeError, ValueError):
        raise InputError(f"{value!r} is not a pair of numbers", where=where, fix="(0, 0.8)") from None
    return finite(first, where), finite(last, where)


def flag(value: object, where: str) -> bool:
    """Yes or no.

    Raises:
        InputError: anything but True and False.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{where} is {value!r:.60}, expected True or False", where=where)
    return bool(value)


def one_of(value: Any, kind: type[Any], where: str) -> Any:
    """A value of a type of ours, or None.

    Raises:
        InputError: anything else.
    """
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{where} is {type(value).__name__}, expected {kind.__name__}", where=where)
    return value


def _texts(value: object, what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        check_text(value, what)
        return (str(value),)
    for text in value:
        check_text(text, what)
    return tuple(value)


def _repeated(values: Sequence[Any], copies: int) -> tuple[Any, ...]:
    """Each value `copies` times in a row, as diffusers orders the images of several prompts."""
    return tuple(value for value in values for _ in range(copies))


def _dealt(distinct: int, count: int) -> tuple[int, ...]:
    """Which of several images belongs to each of `count` images: in turn, as diffusers repeats a batch of them."""
    return tuple(i % distinct for i in range(count)) if distinct else ()


def _opened_all(
    given: ImageLike | Sequence[ImageLike], opened: Callable[[ImageLike, str], Opened], what: str, count: int
) -> list[Opened]:
    """One or several images or masks, all arrays of one shape or none an array."""
    if isinstance(given, np.ndarray):
        batch = given.ndim == 4 or (what == "mask" and given.ndim == 3 and given.shape[2] != 1)
        sources: Sequence[Any] = given if batch else [given]  # type: ignore[assignment]
    else:
        sources = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not len(sources) or count % len(sources):
        raise InputError(f"{len(sources)} {what}s for {count} image{'s' * (count != 1)} to make", where=what,
                         fix="give one, or one for each")
    images = [opened(source, what) for source in sources]
    kinds = {image.shape if isinstance(image, np.ndarray) else None for image in images}
    if len(kinds) > 1:
        raise InputError(f"the {what}s are arrays of different shapes, or not all arrays", where=what,
                         fix="give all as Pillow images or paths")
    return images


def _size(
    facts: PipelineFacts, sessions: Mapping[str, Session], height: int | None, width: int | None,
    image: tuple[int, int] | None, latents: object, tile: int | None,
) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else the latents', else the image's rounded down to whole latents,
    else the model's own."""
    own = facts.height, facts.width
    sizes = []
    for axis, (name, given) in enumerate((("height", height), ("width", width))):
        if given is not None:
            size = given
        elif isinstance(latents, np.ndarray) and latents.ndim == 4 and latents.shape[axis + 2]:
            size = latents.shape[axis + 2] * facts.vae_scale_factor
        elif image is not None:
            sizes.append(_image_size(facts, sessions, name, image[axis], tile))
            continue
        else:
            size = own[axis]
        sizes.append(_checked_size(facts, sessions, name, size, tile))
    return sizes[0], sizes[1]


def _image_size(
    facts: PipelineFacts, sessions: Mapping[str, Session], name: str, pixels: int, tile: int | None
) -> int:
    """An image's height or width in whole latents, rounded down as by `VaeImageProcessor.get_default_height_width`."""
    try:
        return _checked_size(facts, sessions, name, pixels - pixels % facts.vae_scale_factor, tile)
    except InputError as error:
        raise InputError(f"the image's {name} of {pixels} will not do: {error.what}", where="image",
                         fix=f"give {name}; {error.fix}") from error


def _checked_size(
    facts: PipelineFacts, sessions: Mapping[str, Session], name: str, pixels: int, tile: int | None
) -> int:
    return check_size(facts, sessions, name, pixels) if tile is None else _check_tiled(facts, name, pixels)


def _check_tiled(facts: PipelineFacts, name: str, pixels: int) -> int:
    """Tiles cover any whole number of latents, up to what an image may have at all."""
    factor = facts.vae_scale_factor
    if whole(pixels, name, LARGEST_SIDE) % factor or pixels > MAX_TILED_SIDE:
        raise InputError(f"{name} is {pixels}, expected a multiple of {factor} up to {MAX_TILED_SIDE:,}", where=name,
                         fix=f"nearest: {min(max(round(pixels / factor), 1) * factor, MAX_TILED_SIDE)}")
    return pixels


def _tiling(
    facts: PipelineFacts, sessions: Mapping[str, Session], height: int, width: int, tile: int
) -> Tiling | None:
    """Tiles of `tile` pixels, smaller where the image is; None if one tile is all of it."""
    tile = whole(tile, "tile", LARGEST_SIDE)
    rows = check_size(facts, sessions, "height", min(tile, height)) // facts.vae_scale_factor
    columns = check_size(facts, sessions, "width", min(tile, width)) // facts.vae_scale_factor
    shape = height // facts.vae_scale_factor, width // facts.vae_scale_factor
    return None if shape == (rows, columns) else Tiling(shape, (rows, columns))
