"""Resolves a request for a bundle: finds sizes and defaults, opens images, and makes one entry for each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import Described, input_spec
from runtimes.backends.session import Session
from runtimes.bundle.roles import Roles
from runtimes.bundle.tensors import ShapeRange
from runtimes.codec.pixels import ImageLike, Opened, open_image, open_mask, size_of, to_mask, to_pixels
from runtimes.codec.tiling import Tiling
from runtimes.errors import BundleError, InputError
from runtimes.inputs.aspect_ratios import nearest_size, parse_aspect
from runtimes.inputs.noise import resolve_seeds
from runtimes.inputs.request import Request
from runtimes.inputs.request_fields import LARGEST_SIDE, whole

MAX_TILED_SIDE = 8192


@dataclass(frozen=True)
class Resolved:
    """A request as a bundle can do it. Everything per image has one entry for each of the B images.

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


def resolve(
    sessions: Mapping[str, Session], roles: Roles, request: Request, *, guided: bool, strength: float
) -> Resolved:
    """Find out what a request means for a bundle. No network runs.

    Args:
        sessions: the networks.
        roles: of the pipeline.
        request: what is asked for.
        guided: whether negative prompts are needed.
        strength: of the request, or the mode's own.

    Raises:
        InputError: the first field that cannot be used with this bundle.
    """
    prompts, copies, count = request.prompts, request.images_per_prompt, request.count
    if not roles.encoders and any(prompts):
        raise InputError("this model generates without prompts", where="prompt", fix="leave the prompt empty")
    images = [] if request.image is None else _opened_all(request.image, open_image, "image", count)
    masks = [] if request.mask is None else _opened_all(request.mask, open_mask, "mask", count)
    if len({len(images), len(masks)} - {0, 1}) > 1:
        raise InputError(f"{len(masks)} masks for {len(images)} images", where="mask", fix="give one, or one each")
    # As diffusers has it, an image sets the size of what is made of it, but not of what is painted into it.
    height, width = _size(roles, sessions, request, None if masks or not images else size_of(images[0]))
    shape = roles.codec.latent_channels, height // roles.codec.factor, width // roles.codec.factor
    if request.latents is not None and request.latents.shape != (count, *shape):
        raise InputError(f"the latents are float32 {request.latents.shape}, expected float32 {(count, *shape)}",
                         where="latents", fix="(images, channels, height / f, width / f), unit variance")
    return Resolved(
        prompts=_repeated(prompts, copies),
        negatives=_repeated(request.negative_prompts, copies) if guided else (),
        negatives_given=request.negative_prompt is not None,
        latent_shape=shape,
        height=height,
        width=width,
        tiling=None if request.tile is None else _tiling(roles, sessions, height, width, request.tile),
        seeds=resolve_seeds(request.seed, count),
        images=np.stack([to_pixels(p, height, width) for p in images]) if images else None,
        image_of=_dealt(len(images), count),
        strength=strength,
        masks=np.stack([to_mask(m, height, width) for m in masks]) if masks else None,
        mask_of=_dealt(len(masks), count),
        latents=request.latents,
    )


def check_size(roles: Roles, sessions: Mapping[str, Session], name: str, pixels: int) -> int:
    """Refuse a height or width that the networks do not take.

    Raises:
        InputError: not a multiple, or outside the range that the bundle was built for.
    """
    limits, multiple = pixel_limits(roles, sessions, name)
    pixels = whole(pixels, name, LARGEST_SIDE)
    if pixels % multiple or pixels not in limits:
        steps = f" in steps of {multiple}" if limits.min < limits.max else ""
        near = sorted({min(max(p, limits.min), limits.max)
                       for p in (pixels // multiple * multiple, -(-pixels // multiple) * multiple)})
        raise InputError(f"{name} is {pixels}, the bundle makes {limits.min} to {limits.max}{steps}", where=name,
                         fix=f"nearest: {' or '.join(map(str, near))}; other sizes need a rebuild with --shapes")
    return pixels


def pixel_limits(roles: Roles, sessions: Mapping[str, Described], name: str) -> tuple[ShapeRange, int]:
    """The range of a height or width in pixels, and what it is a multiple of: for denoiser and decoder alike."""
    position = {"height": 2, "width": 3}[name]
    least, most, multiple = 1, 1 << 20, 1
    denoiser, decoder = roles.denoiser, roles.codec.decoder
    for component, tensor in ((denoiser.component, denoiser.sample), (decoder.component, decoder.input)):
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
        raise InputError(f"denoiser and decoder have no {name} in common", where=name, fix="build the bundle again")
    factor = roles.codec.factor
    return ShapeRange(least * factor, least * factor, most * factor), multiple * factor


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


def size_for(roles: Roles, sessions: Mapping[str, Described], aspect: float) -> tuple[int, int]:
    """Height and width in pixels nearest to an aspect ratio, at about the pixels of the model's own size.

    Args:
        roles: of the pipeline.
        sessions: denoiser and decoder, or what a manifest says of them.
        aspect: width over height.
    """
    sides = [pixel_limits(roles, sessions, name) for name in ("height", "width")]
    return nearest_size(aspect, roles.codec.height * roles.codec.width, *sides)


def _size(
    roles: Roles, sessions: Mapping[str, Session], request: Request, image: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width in pixels: as asked for, else the latents', else the image's rounded down to whole latents,
    else the model's own."""
    if request.aspect is not None:
        return size_for(roles, sessions, parse_aspect(request.aspect))
    own, latents = (roles.codec.height, roles.codec.width), request.latents
    sizes = []
    for axis, (name, given) in enumerate((("height", request.height), ("width", request.width))):
        if given is not None:
            size = given
        elif latents is not None and latents.shape[axis + 2]:
            size = latents.shape[axis + 2] * roles.codec.factor
        elif image is not None:
            sizes.append(_image_size(roles, sessions, name, image[axis], request.tile))
            continue
        else:
            size = own[axis]
        sizes.append(_checked_size(roles, sessions, name, size, request.tile))
    return sizes[0], sizes[1]


def _image_size(
    roles: Roles, sessions: Mapping[str, Session], name: str, pixels: int, tile: int | None
) -> int:
    """An image's height or width in whole latents, rounded down as by `VaeImageProcessor.get_default_height_width`."""
    try:
        return _checked_size(roles, sessions, name, pixels - pixels % roles.codec.factor, tile)
    except InputError as error:
        raise InputError(f"the image's {name} of {pixels} will not do: {error.what}", where="image",
                         fix=f"give {name}; {error.fix}") from error


def _checked_size(
    roles: Roles, sessions: Mapping[str, Session], name: str, pixels: int, tile: int | None
) -> int:
    return check_size(roles, sessions, name, pixels) if tile is None else _check_tiled(roles, name, pixels)


def _check_tiled(roles: Roles, name: str, pixels: int) -> int:
    """Tiles cover any whole number of latents, up to what an image may have at all."""
    factor = roles.codec.factor
    if whole(pixels, name, LARGEST_SIDE) % factor or pixels > MAX_TILED_SIDE:
        raise InputError(f"{name} is {pixels}, expected a multiple of {factor} up to {MAX_TILED_SIDE:,}", where=name,
                         fix=f"nearest: {min(max(round(pixels / factor), 1) * factor, MAX_TILED_SIDE)}")
    return pixels


def _tiling(
    roles: Roles, sessions: Mapping[str, Session], height: int, width: int, tile: int
) -> Tiling | None:
    """Tiles of `tile` pixels, smaller where the image is; None if one tile is all of it."""
    tile = whole(tile, "tile", LARGEST_SIDE)
    rows = check_size(roles, sessions, "height", min(tile, height)) // roles.codec.factor
    columns = check_size(roles, sessions, "width", min(tile, width)) // roles.codec.factor
    shape = height // roles.codec.factor, width // roles.codec.factor
    return None if shape == (rows, columns) else Tiling(shape, (rows, columns))
