"""The kinds of values that a request's fields hold: how each is checked, read from text, and named to Triton.

The fields themselves are in `runtimes.inputs.request`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import InputError
from runtimes.inputs.aspect_ratios import parse_aspect
from runtimes.inputs.noise import checked_seed
from runtimes.text.clip_tokenizer import check_text

MOST = 10_000  # of steps, images and whatever else is counted: more is a slip of the pen, and takes all memory
LARGEST_SIDE = 1 << 31  # only keeps numbers sane: a bundle's axes have ranges
Limits = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
        check: (value, name, the field's metadata) -> the value as a request holds it; raises InputError.
        word: what one value is on a command line: str, int, float, bool for a flag, Path for a file.
        several: whether a field holds one value or a sequence of them.
        tensor: data type and dimensions of the field as an input of Triton's, or None where it cannot be one.
        array: whether the values are arrays or files of them, which a request over the network cannot name.
    """

    check: Callable[[Any, str, Limits], Any]
    word: type
    several: bool = False
    tensor: tuple[str, tuple[int, ...]] | None = None
    array: bool = False


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


def _whole(value: Any, name: str, limits: Limits) -> int:
    return whole(value, name)


def _pixels(value: Any, name: str, limits: Limits) -> int:
    return whole(value, name, LARGEST_SIDE)


def _number(value: Any, name: str, limits: Limits) -> float:
    number = finite(value, name)
    above, least, most = (limits.get(key) for key in ("above", "least", "most"))
    if (above is not None and number <= above) or (least is not None and number < least) or (
            most is not None and number > most):
        span = f"between {least:g} and {most:g}" if above is None else f"above {above:g} and at most {most:g}"
        raise InputError(f"{name} is {number:g}, not {span}", where=name)
    return number


def _flag(value: object, name: str, limits: Limits) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {value!r:.60}, expected True or False", where=name)
    return bool(value)


def _choice(value: Any, name: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, expected str", where=name)
    if value not in limits["choices"]:
        raise InputError(f"unknown {name} {value!r}", where=name, fix=f"one of {', '.join(limits['choices'])}")
    return value


def _interval(value: Any, name: str, limits: Limits) -> tuple[float, float]:
    """First and last share, from a pair or from `first:last`."""
    try:
        first, last = [float(part) for part in value.split(":")] if isinstance(value, str) else value
    except (TypeError, ValueError):
        raise InputError(f"{value!r:.60} is not a pair of numbers", where=name, fix="(0, 0.8), or 0:0.8") from None
    first, last = finite(first, name), finite(last, name)
    if not 0 <= first < last <= 1:
        raise InputError(f"{(first, last)} is not an interval within 0 to 1", where=name, fix="(0, 1) is all of it")
    return first, last


def _aspect(value: Any, name: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, expected str", where=name, fix='"16:9"')
    parse_aspect(value)
    return value


def _texts(value: Any, name: str, limits: Limits) -> str | tuple[str, ...]:
    what = f"the {name.replace('_', ' ')}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        check_text(value, what)
        return str(value)
    for text in value:
        check_text(text, what)
    return tuple(value)


def _seeds(value: Any, name: str, limits: Limits) -> int | tuple[int, ...]:
    if (isinstance(value, Sequence) and not isinstance(value, str)) or (isinstance(value, np.ndarray) and value.ndim):
        return tuple(checked_seed(seed) for seed in value)
    return checked_seed(value)


def _images(value: Any, name: str, limits: Limits) -> Any:
    """As it is: files are opened, and images checked, together with the size that they are wanted in."""
    return value


def _latents(value: Any, name: str, limits: Limits) -> NDArray[np.float32]:
    """An array, or what a .npy file holds; pickled arrays are refused."""
    if isinstance(value, str | os.PathLike):
        file = Path(value)
        try:
            value = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"not a plain .npy array: {error}", where=str(file)) from error
        if not isinstance(value, np.ndarray):
            raise InputError("expected a .npy file with one array", where=str(file))
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim != 4:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"the latents are {found}, expected float32 (images, channels, height / f, width / f)",
                         where=name, fix="give an array of unit variance, or its .npy file")
    if not np.isfinite(value).all():
        raise InputError("the latents hold NaN or infinity", where=name)
    return value


@dataclass(frozen=True)
class SizeConditions:
    """Sizes and scores that are inputs of Stable Diffusion XL, in pixels. Other models ignore them.

    Attributes:
        original: height and width that the training image had before it was resized; the image's by default.
        crop: top and left of the crop.
        target: height and width to generate for; the image's by default.
        aesthetic_score, negative_aesthetic_score: of the refiner, 0 to 10, for the prompt and the negative prompt.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    @classmethod
    def read(cls, value: str | Mapping[str, Any], where: str = "sizes") -> SizeConditions:
        """From `original=1024:768,crop=0:0,aesthetic_score=6`, or a mapping of the same keys.

        Raises:
            InputError: an unknown key, or a value that is no number or pair of numbers.
        """
        if isinstance(value, str):
            value = dict(part.partition("=")[::2] for part in value.split(",") if part)
        names = {field.name: isinstance(field.default, float) for field in dataclasses.fields(cls)}
        if unknown := [key for key in value if key not in names]:
            raise InputError(f"unknown key {unknown[0]!r}", where=where, fix=f"known are {', '.join(names)}")
        read: dict[str, Any] = {key: _size_number(part, where) if names[key] else _size_pair(part, where)
                                for key, part in value.items()}
        return cls(**read)

    def numbers(self, names: Sequence[str], height: int, width: int, *, negative: bool = False) -> NDArray[np.float32]:
        """The values of one input of `Conditioner.numbers`, (len(names),) float32.

        The refiner's negative branch has no crop and its own score, as in StableDiffusionXLImg2ImgPipeline.
        """
        scored = "aesthetic_score" in names
        crop = (0, 0) if negative and scored else self.crop
        original, target = self.original or (height, width), self.target or (height, width)
        values = dict(zip(("original_height", "original_width", "crop_top", "crop_left", "target_height",
                           "target_width"), (*original, *crop, *target), strict=True))
        values["aesthetic_score"] = self.negative_aesthetic_score if negative else self.aesthetic_score  # type: ignore[assignment]
        if unknown := [name for name in names if name not in values]:
            raise InputError(f"the denoiser wants {unknown[0]}, which is unknown", where="time_ids",
                             fix="upgrade ldm-deploy")
        numbers = np.array([values[name] for name in names], np.float32)
        if not np.isfinite(numbers).all():
            raise InputError("sizes and scores must be finite", where="sizes")
        return numbers


def _size_number(value: Any, where: str) -> float:
    try:
        return finite(float(value) if isinstance(value, str) else value, where)
    except ValueError:
        raise InputError(f"{value!r:.60} is not a number", where=where) from None


def _size_pair(value: Any, where: str) -> tuple[int, int]:
    try:
        first, second = [int(part) for part in value.split(":")] if isinstance(value, str) else map(operator.index,
                                                                                                    value)
    except (TypeError, ValueError):
        raise InputError(f"{value!r:.60} is not a pair of whole numbers", where=where, fix="1024:768") from None
    return first, second


def _sizes(value: Any, name: str, limits: Limits) -> SizeConditions:
    if isinstance(value, SizeConditions):
        return value
    if not isinstance(value, str | Mapping):
        raise InputError(f"{name} is {type(value).__name__}, expected SizeConditions", where=name)
    return SizeConditions.read(value, name)


WHOLE = Kind(_whole, int, tensor=("TYPE_INT32", (1,)))
PIXELS = Kind(_pixels, int, tensor=("TYPE_INT32", (1,)))
NUMBER = Kind(_number, float, tensor=("TYPE_FP32", (1,)))
FLAG = Kind(_flag, bool, tensor=("TYPE_BOOL", (1,)))
CHOICE = Kind(_choice, str, tensor=("TYPE_STRING", (1,)))
INTERVAL = Kind(_interval, str, tensor=("TYPE_FP32", (2,)))
ASPECT = Kind(_aspect, str, tensor=("TYPE_STRING", (1,)))
SIZES = Kind(_sizes, str, tensor=("TYPE_STRING", (1,)))
TEXTS = Kind(_texts, str, several=True, tensor=("TYPE_STRING", (-1,)))
SEEDS = Kind(_seeds, int, several=True, tensor=("TYPE_INT64", (-1,)))
IMAGES = Kind(_images, Path, several=True, tensor=("TYPE_FP32", (-1, -1, -1, 3)), array=True)
MASKS = Kind(_images, Path, several=True, tensor=("TYPE_FP32", (-1, -1, -1)), array=True)
LATENTS = Kind(_latents, Path, tensor=("TYPE_FP32", (-1, -1, -1, -1)), array=True)
ANSWER = Kind(_choice, str)  # in which form images are returned: a caller in the same process alone can choose
