"""What the U-Net is told besides sample and timestep: the prompt as one or two text encoders read it, pooled
embeddings, and sizes as numbers (Stable Diffusion XL, arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import input_spec
from runtimes.backends.session import Session
from runtimes.bundle.manifest import PipelineFacts
from runtimes.errors import InputError
from runtimes.pipeline.request import Request
from runtimes.text.prompt_cache import PromptCache
from runtimes.text.prompt_encoder import Embedder, PromptStyle, Tokenize

Float32 = NDArray[np.float32]
POOLED, SIZES = "text_embeds", "time_ids"


@dataclass(frozen=True)
class SizeConditions:
    """Sizes and scores that Stable Diffusion XL was trained to be told, in pixels. Other models ignore them.

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

    def numbers(self, names: Sequence[str], height: int, width: int, *, negative: bool = False) -> Float32:
        """The values of `PipelineFacts.time_ids`, (len(names),) float32.

        The refiner's negative branch has no crop and its own score, as in StableDiffusionXLImg2ImgPipeline.
        """
        scored = "aesthetic_score" in names
        crop = (0, 0) if negative and scored else self.crop
        original, target = self.original or (height, width), self.target or (height, width)
        values = dict(zip(("original_height", "original_width", "crop_top", "crop_left", "target_height",
                           "target_width"), (*original, *crop, *target), strict=True))
        values["aesthetic_score"] = self.negative_aesthetic_score if negative else self.aesthetic_score  # type: ignore[assignment]
        if unknown := [name for name in names if name not in values]:
            raise InputError(f"the U-Net wants {unknown[0]}, which is unknown", where=SIZES, fix="upgrade ldm-deploy")
        numbers = np.array([values[name] for name in names], np.float32)
        if not np.isfinite(numbers).all():
            raise InputError("sizes and scores must be finite", where="sizes")
        return numbers


@dataclass(frozen=True)
class Conditions:
    """One entry for each of the B images.

    Attributes:
        cond: (tokens, width) float32 each; (0, 0) for a pipeline without prompts.
        uncond: the same for the negative prompts, or None without guidance.
        added, added_uncond: further inputs of the U-Net by name, (B, n) float32 each.
    """

    cond: list[Float32]
    uncond: list[Float32] | None
    added: Mapping[str, Float32] = field(default_factory=dict)
    added_uncond: Mapping[str, Float32] = field(default_factory=dict)

    def repeated(self, count: int) -> Conditions:
        """The same for `count` * B rows, all of the images before the first again."""
        added, added_uncond = ({name: np.concatenate([values] * count) for name, values in part.items()}
                               for part in (self.added, self.added_uncond))
        return Conditions(self.cond * count, self.uncond and self.uncond * count, added, added_uncond)


def gather(
    sessions: Mapping[str, Session], facts: PipelineFacts, tokenizers: Sequence[Tokenize], cache: PromptCache,
    style: PromptStyle, request: Request, sizes: SizeConditions,
) -> Conditions:
    """Encode the prompts of a request and collect what else the U-Net takes.

    Args:
        sessions: the networks; `facts.text_encoders` names those that read the prompt.
        facts: of the pipeline.
        tokenizers: one for each text encoder.
        cache: of embedded prompts.
        style: how prompts are read.
        request: a checked call.
        sizes: what is told about sizes.
    """
    images = len(request.prompts)
    guided = bool(request.negatives)
    if not facts.text_encoders:
        return Conditions([np.empty((0, 0), np.float32)] * images, None)
    embedders = [Embedder(tokenize, sessions[name], cache, style)
                 for name, tokenize in zip(facts.text_encoders, tokenizers, strict=True)]
    pairs = [embedder.pair(request.prompts, request.negatives) for embedder in embedders]
    cond = _side_by_side([pair[0] for pair in pairs])
    uncond = _side_by_side([pair[1] for pair in pairs if pair[1] is not None]) if guided else None
    added: dict[str, Float32] = {}
    added_uncond: dict[str, Float32] = {}
    wanted = {spec.name for spec in sessions["unet"].component.inputs}
    if POOLED in wanted:
        added[POOLED] = embedders[-1].pooled(request.prompts)
        if guided:
            added_uncond[POOLED] = embedders[-1].pooled(request.negatives)
    if SIZES in wanted:
        input_spec(sessions["unet"], SIZES)
        rows = [sizes.numbers(facts.time_ids, request.height, request.width, negative=n) for n in (False, True)]
        added[SIZES], added_uncond[SIZES] = (np.repeat(row[None], images, axis=0) for row in rows)
    if facts.zero_empty_negative and uncond is not None and not request.negatives_given:
        uncond = [np.zeros_like(row) for row in uncond]
        added_uncond[POOLED] = np.zeros_like(added_uncond[POOLED])
    return Conditions(cond, uncond, added, added_uncond)


def _side_by_side(parts: Sequence[list[Float32]]) -> list[Float32]:
    return parts[0] if len(parts) == 1 else [np.concatenate(row, axis=-1) for row in zip(*parts, strict=True)]
