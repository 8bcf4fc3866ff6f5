"""`Request`: everything that one call asks of a pipeline. Nothing here knows a bundle.

A field's name, default, range and help text are written here alone. The keywords of `Pipeline.__call__`, the options of
`python -m deploy generate`, the keys of `Request.from_mapping` (JSON, YAML) and Triton's inputs are made of them.
"""
# ruff: noqa: RUF009 - `asked` is dataclasses.field with metadata

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.codec.pixels import ImageLike
from runtimes.errors import InputError
from runtimes.inputs import request_fields as kinds
from runtimes.inputs.noise import resolve_seeds
from runtimes.inputs.request_fields import MOST, Kind, SizeConditions, whole
from runtimes.schedulers import SCHEDULERS

OUTPUTS = ("pil", "numpy", "latents")
WHOLE_RUN = (0.0, 1.0)


def asked(value: Any, kind: Kind, help: str, more: str = "", /, **limits: Any) -> Any:
    """A field of a request.

    Args:
        value: the default.
        kind: what it may hold.
        help: what it does, in a line or two, without range, choices and default.
        more: what only a programmer wants to know.
        limits: `default` in words; `least`, `above`, `most`, `choices`; of the command line `flags`, `argument`,
            `command_line` (another default there), `no_option` (why there is none).
    """
    return field(default=value, metadata={"kind": kind, "help": help, "more": more, **limits})


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that one call asks of a pipeline, checked as far as no bundle is needed. B images come of it.

    Raises:
        InputError: the first field that cannot be used.
    """

    prompt: str | Sequence[str] = asked(
        "", kinds.TEXTS, "what to generate: one text or several", "Empty for a model without prompts.",
        default="none, for models without prompts", argument="PROMPT")
    _: KW_ONLY
    negative_prompt: str | Sequence[str] | None = asked(
        None, kinds.TEXTS, "what to steer away from: one text, or one for each prompt; without effect where guidance "
        "is off", default="the empty text; for XL an all-zero embedding", flags=("--negative",))
    steps: int = asked(
        DEFAULT_STEPS, kinds.WHOLE, "denoising steps of an image; more take longer and are more accurate", least=1)
    guidance_scale: float | None = asked(
        None, kinds.NUMBER, "how strongly to follow the prompt; usual are 1 to 15; at 1 and below guidance is off "
        "and a step costs half",
        "The default is that of diffusers' class for the mode. Models read by LDMBert are guided by every scale but 1.",
        default="the model's: 7.5, of XL 5", flags=("--guidance",))
    seed: int | Sequence[int] | None = asked(
        None, kinds.SEEDS, "seed of the first image, the next ones count up; or one for each image; 0 to "
        "4294967295, of other numbers the low 32 bits count",
        'The noise is that of `torch.Generator("cpu").manual_seed(seed)`, bit for bit: diffusers makes the same image '
        "with it, and the same images with a list of them.",
        default="unpredictable", command_line=0)
    images_per_prompt: int = asked(
        1, kinds.WHOLE, "images for each prompt, which follow each other in the result", least=1,
        flags=("-n", "--count"))
    height: int | None = asked(
        None, kinds.PIXELS, "pixels, of the sizes that the bundle was built for", least=1,
        default="the latents'; without latents, the image's rounded down; without either, or under a mask without "
        "latents, the model's own")
    width: int | None = asked(
        None, kinds.PIXELS, "pixels, of the sizes that the bundle was built for", least=1,
        default="as for the height")
    aspect: str | None = asked(
        None, kinds.ASPECT, "width:height, as 16:9, in place of height and width: the bundle's nearest size, at about "
        "the pixels of the model's own", default="none")
    scheduler: str | None = asked(
        None, kinds.CHOICE, "sampling method, over the model's noise schedule", choices=tuple(SCHEDULERS),
        default="the model's own")
    eta: float = asked(
        0.0, kinds.NUMBER, "share of fresh noise in the steps of the schedulers ddim and tcd", least=0, most=1)
    guidance_rescale: float = asked(
        0.0, kinds.NUMBER, "share of rescaling against overexposure; 0.7 is usual", "See `guidance.Guidance`.",
        least=0, most=1)
    guidance_interval: tuple[float, float] = asked(
        WHOLE_RUN, kinds.INTERVAL, "steps under guidance, as shares of their number: 0.1:0.7 guides the 3rd to the "
        "17th of 25; a step outside costs half", default="0:1")
    image: ImageLike | Sequence[ImageLike] | None = asked(
        None, kinds.IMAGES, "start from this image, resized to height and width (image to image); several are dealt "
        "out in turn", "A path, a Pillow image of mode RGB, or a float array (H, W, 3) or (K, H, W, 3) in 0..1. See "
        "`runtimes.codec.pixels`.", default="none")
    mask: ImageLike | Sequence[ImageLike] | None = asked(
        None, kinds.MASKS, "white where the image is painted anew, black where it stays (inpainting); resized to "
        "height and width", "A path, a Pillow image, or an array (H, W) or (K, H, W), 1 from 0.5 on.", default="none")
    strength: float | None = asked(
        None, kinds.NUMBER, "share of the steps that the image goes through; the more, the less is left of it",
        "The default is that of diffusers' class for the mode; 1 under a mask starts from noise alone.",
        above=0, most=1, default="the model's: 0.8, of XL 0.3; under a mask 1, of XL 0.9999")
    weighting: bool = asked(
        False, kinds.FLAG, "weigh (word:1.3), (word), [word] in prompts", "See `runtimes.text.prompt_weighting`.")
    long_prompts: bool = asked(
        False, kinds.FLAG, "read prompts that are too long for the text encoder in windows, instead of cutting them",
        "The denoiser must take that many tokens: build with --shapes sequence=...")
    cache_interval: int = asked(
        1, kinds.WHOLE, "compute the denoiser's deep layers at every so many steps only, and reuse them between; 3 is "
        "more than twice as fast; needs a bundle built with --step-cache", least=1)
    tile: int | None = asked(
        None, kinds.PIXELS, "generate in overlapping tiles of so many pixels a side, so that height and width may go "
        "beyond what the bundle was built for", "Tiles are computed one at a time, within the memory of one; see "
        "`runtimes.codec.tiling`.", least=1, default="no tiles")
    latents: NDArray[np.float32] | None = asked(
        None, kinds.LATENTS, "initial latents in place of the seeds' noise, a .npy file of float32 (B, C, H/f, W/f), "
        "unit variance", "Or such an array. Under a mask, denoising starts from them alone, whatever the strength.",
        default="none")
    output: str = asked(
        "pil", kinds.ANSWER, "the form of the result: Pillow images, pixels (B, H, W, 3) float32 in 0..1, or latents "
        "(B, C, H/f, W/f) float32 that were not decoded", choices=OUTPUTS,
        no_option="images are written to --output, latents to --save-latents")
    part: tuple[float, float] = asked(
        WHOLE_RUN, kinds.INTERVAL, "part to denoise, as shares of the noise schedule, not of the steps: 0:0.8 by a "
        "base model, 0.8:1 by a refiner",
        'The first with output="latents", which the second starts from as they are.', default="0:1")
    sizes: SizeConditions | None = asked(
        None, kinds.SIZES, "size conditions of Stable Diffusion XL, as original=1024:768,crop=0:0; further keys: "
        "target, aesthetic_score, negative_aesthetic_score", default="that the image is whole")

    def __post_init__(self) -> None:
        """Check every field by its kind, then what fields say of each other."""
        for declared in fields(self):
            value = getattr(self, declared.name)
            if value is not declared.default:
                kind: Kind = declared.metadata["kind"]
                object.__setattr__(self, declared.name, kind.check(value, declared.name, declared.metadata))
        self._check_counts()
        if self.aspect is not None and (self.height is not None or self.width is not None):
            raise InputError("both an aspect and a height or width are given", where="aspect", fix="give one of them")
        if self.mask is not None and self.image is None:
            raise InputError("a mask without an image", where="mask", fix="give the image that it lies over")
        if self.strength is not None and self.image is None:
            raise InputError("a strength without an image", where="strength", fix="give an image, or leave it out")
        if self.part[0] > 0 and (self.latents is None or self.image is not None):
            raise InputError("a part that begins later starts from latents and no image", where="part",
                             fix='give the latents of the part before: output="latents"')

    def _check_counts(self) -> None:
        """Prompts, negative prompts, images and seeds fit in number."""
        if not self.prompts:
            raise InputError("no prompt", where="prompt", fix="give at least one; it may be an empty string")
        whole(self.images_per_prompt, "images_per_prompt", MOST // len(self.prompts))
        given = self.negative_prompt
        if given is not None and not isinstance(given, str) and len(given) != len(self.prompts):
            raise InputError(f"{len(given)} negative prompts for {len(self.prompts)} prompts", where="negative_prompt",
                             fix="give one, or one per prompt")
        if self.seed is not None:
            resolve_seeds(self.seed, self.count)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt, once."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompt of each prompt; empty texts where none is given."""
        given = "" if self.negative_prompt is None else self.negative_prompt
        return (given,) * len(self.prompts) if isinstance(given, str) else tuple(given)

    @property
    def count(self) -> int:
        """How many images are asked for."""
        return len(self.prompts) * self.images_per_prompt

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, files: bool = True) -> Request:
        """A request from what JSON or YAML hold: field names and their values; lists stand for several.

        Args:
            values: as `{"prompt": "a red apple", "steps": 25}`; `sizes` may be a mapping, images and latents are paths.
            files: whether paths may be among them. A server that takes mappings from others says no.

        Raises:
            InputError: a key that no field has, or a value that cannot be used.
        """
        known = {declared.name: declared for declared in fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                raise InputError(f"unknown key {key!r}", where="request",
                                 fix=f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
            if not files and known[key].metadata["kind"].array and not isinstance(values[key], np.ndarray):
                raise InputError("files are not read for this request", where=key, fix="send the image itself")
        return cls(**values)


def described(indent: int = 8) -> str:
    """The fields as the lines of a docstring: name, help text, range or choices, default."""
    lines = []
    for declared in fields(Request):
        said = declared.metadata
        span = f": {', '.join(said['choices'])}" if "choices" in said else ""
        default = said.get("default", repr(declared.default))
        text = f"{declared.name}: {said['help']}{span}. Default: {default}. {said['more']}".strip()
        lines += textwrap.wrap(text, 120 - indent, subsequent_indent="    ")
    return "\n".join(" " * indent + line for line in lines)
