"""Runs images through the model's own safety checker: prepares its input, and says which images its scores flag.

Nothing here changes an image, and it runs only where the caller asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner
from runtimes.backends.session import Session
from runtimes.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = NDArray[np.float32]
SAFETY_CHECKER, CLIP_INPUT = "safety_checker", "clip_input"
SPECIAL_SCORES, CONCEPT_SCORES = "special_scores", "concept_scores"
PREPROCESSOR_FILE = "feature_extractor/preprocessor_config.json"
BICUBIC = 3  # Pillow's and the config's number
SPECIAL_CARE = np.float32(0.01)


@dataclass(frozen=True)
class Preprocessing:
    """How images become the checker's input: transformers' CLIPImageProcessor over Pillow.

    Attributes:
        shortest: pixels of the shorter side after resizing.
        crop: height and width that are cut from the middle.
        resample: Pillow's number of the filter.
        scale: of pixel values 0 to 255.
        mean, deviation: that each channel is normalized by.
    """

    shortest: int
    crop: tuple[int, int]
    resample: int
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Preprocessing:
        """Read preprocessor_config.json, of transformers 4 and 5 alike, where sizes may also be plain numbers.

        Raises:
            InputError: a step is switched off, or a value is missing or of another type.
        """
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise InputError(f"{step} is {config[step]!r}", where=where, fix="only CLIP's own steps are known")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        try:
            found = cls(
                shortest=int(size["shortest_edge"] if isinstance(size, Mapping) else size),
                crop=(int(crop["height"]), int(crop["width"])) if isinstance(crop, Mapping) else (int(crop), int(crop)),
                resample=int(config.get("resample", BICUBIC)), scale=float(config.get("rescale_factor", 1 / 255)),
                mean=tuple(map(float, config["image_mean"])), deviation=tuple(map(float, config["image_std"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a config of CLIPImageProcessor: {error!r}", where=where,
                             fix="copy the pipeline again") from error
        if max(found.crop) > found.shortest or min(found.crop) < 1:
            raise InputError(f"crop_size {found.crop} does not fit into a shortest side of {found.shortest}",
                             where=where, fix="copy the pipeline again")
        return found

    def __call__(self, images: Sequence[Image]) -> Float32:
        """Resize, crop from the middle, scale and normalize: pixels (B, 3, height, width) float32 of `crop`'s size."""
        return np.stack([self._one(image) for image in images])

    def _one(self, image: Image) -> Float32:
        from PIL.Image import Resampling

        image = image.convert("RGB")
        short, long = sorted(image.size)
        longest = int(self.shortest * long / short)
        size = (self.shortest, longest) if image.width <= image.height else (longest, self.shortest)
        pixels = np.asarray(image.resize(size, Resampling(self.resample)))
        height, width = self.crop
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        cut = pixels[top : top + height, left : left + width].transpose(2, 0, 1) * self.scale
        mean, deviation = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.deviation))
        return (cut.astype(np.float32) - mean) / deviation


def flags(session: Session, images: Float32) -> list[bool]:
    """Which images the checker flags, as diffusers' StableDiffusionSafetyChecker decides it.

    An image that one of the special concepts applies to is flagged by every other concept a little sooner. Scores are
    rounded to three digits, so one that is above its threshold by less than half of the last is not above it.

    Args:
        session: clip_input -> special_scores (B, 3), concept_scores (B, 17): cosines less their thresholds.
        images: (B, 3, H, W) float32 from `Preprocessing`.
    """
    scores = RowRunner(session, len(images)).run({CLIP_INPUT: images})
    special, concepts = (scores[name].astype(np.float32) for name in (SPECIAL_SCORES, CONCEPT_SCORES))
    careful = np.zeros(len(images), bool)
    for column in special.T:
        careful |= _above(column, careful)
    return [bool(row.any()) for row in _above(concepts.T, careful).T]


def _above(scores: Float32, careful: NDArray[np.bool_]) -> NDArray[np.bool_]:
    above: NDArray[np.bool_] = np.round(scores + np.where(careful, SPECIAL_CARE, np.float32(0)), 3) > 0
    return above
