"""The requests that both sides get: a few for each mode, which reach everything that a pipeline prepares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT, IMAGE, MASK = "text", "image", "mask"
PROMPTS = ("a (red) apple: on [blue] table, 50% off", "Café  ÜBER 42 苹果 don't")
LONG = " ".join(f"word {i}" for i in range(60))
SEED = 7


@dataclass(frozen=True)
class Asked:
    """One request, in the words of both sides; what is None is left to either side's own default.

    Attributes:
        name: in reports.
        mode: text, image (an initial image) or mask (an image and a mask).
        prompts, negatives: one entry an image; no negatives means that none is given.
        size: height and width in pixels, of the result or of the images that it is made from.
        sized: whether the size is given; a pipeline may take it from the image.
        seed: of the first image; the others count on from it.
    """

    name: str
    mode: str
    prompts: tuple[str, ...] = PROMPTS
    negatives: tuple[str, ...] = ()
    steps: int = 4
    guidance: float | None = None
    strength: float | None = None
    size: tuple[int, int] | None = None
    sized: bool = True
    seed: int = SEED

    def images(self) -> dict[str, Image]:
        """The initial image and the mask of the mode; another aspect than the result's, grey edges in the mask."""
        if self.mode == TEXT or self.size is None:
            return {}
        height, width = self.size
        found = {"image": smooth_image(height + height // 2, width, self.seed)}
        return found if self.mode == IMAGE else {**found, "mask": soft_mask(height, width + width // 4)}

    def fitted(self, parameters: Collection[str]) -> Asked:
        """The request without what a pipeline's call does not know: negative prompts, sizes, guidance."""
        return replace(self, negatives=self.negatives if "negative_prompt" in parameters else (),
                       guidance=self.guidance if "guidance_scale" in parameters else None,
                       strength=self.strength if "strength" in parameters else None, sized="height" in parameters)

    def to_theirs(self, images: Mapping[str, Any], generators: Any, parameters: Collection[str]) -> dict[str, Any]:
        """Keywords of diffusers' pipeline, whose call has these parameters."""
        given = {"num_inference_steps": self.steps, "generator": generators, "guidance_scale": self.guidance,
                 "strength": self.strength, "image": images.get("image"), "mask_image": images.get("mask"),
                 "negative_prompt": list(self.negatives) or None, **self._sized()}
        given |= {"prompt": list(self.prompts)} if "prompt" in parameters else {"batch_size": len(self.prompts)}
        return {name: value for name, value in given.items() if value is not None}

    def to_ours(self, images: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
        """Keywords of `runtimes.Pipeline`."""
        given = {"prompt": list(self.prompts) if "prompt" in parameters else [""] * len(self.prompts),
                 "negative_prompt": list(self.negatives) or None, "steps": self.steps, "seed": self.seed,
                 "guidance_scale": self.guidance, "strength": self.strength, "image": images.get("image"),
                 "mask": images.get("mask"), **self._sized()}
        return {name: value for name, value in given.items() if value is not None}

    def _sized(self) -> dict[str, int]:
        return {} if self.size is None or not self.sized else {"height": self.size[0], "width": self.size[1]}


def plan_requests(unit: int, native: int) -> tuple[Asked, ...]:
    """Requests of the *feeds* level in every mode.

    Args:
        unit: pixels that sizes must be multiples of.
        native: the model's own side in pixels; sizes that are asked for are at most half of it, since the encoder of
            the autoencoder runs for real.
    """
    half = max(unit, native // 2 // unit * unit)
    other = half, max(unit, half - unit) if half > unit else 2 * unit
    return (
        Asked("text", TEXT, negatives=("blurry, (bad)", "")),
        Asked("text without negative prompt", TEXT, prompts=("",), steps=7, size=other),
        Asked("text without guidance", TEXT, prompts=(LONG,), steps=2, guidance=1.0, size=other),
        Asked("image", IMAGE, prompts=PROMPTS[:1], negatives=("blurry",), steps=7, size=other),
        Asked("mask", MASK, prompts=PROMPTS[:1], negatives=("blurry",), size=(half, half)),
        Asked("mask at strength 0.6", MASK, prompts=PROMPTS[1:], steps=7, strength=0.6, size=(half, half)))


def smooth_image(height: int, width: int, seed: int) -> Image:
    """A seeded RGB image with structure at several scales."""
    from PIL import Image as PillowImage

    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (2, 5, 16):
        grid = PillowImage.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += np.asarray(grid.resize((width, height), PillowImage.Resampling.BICUBIC), np.float64)
    return PillowImage.fromarray((pixels / 3).astype(np.uint8))


def soft_mask(height: int, width: int) -> Image:
    """A grey disc, white in its middle, whose edge crosses one half between pixels."""
    from PIL import Image as PillowImage

    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.hypot((rows - 0.45 * height) / height, (columns - 0.6 * width) / width)
    return PillowImage.fromarray((255 * np.clip(1.6 - 4 * distance, 0, 1)).astype(np.uint8))
