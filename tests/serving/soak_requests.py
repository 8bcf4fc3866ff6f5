"""What a soak asks for: requests by number, each the same whoever makes it, and bodies that must be refused.

    python -m tests.serving.soak_requests BUNDLE < NUMBERS > DIGESTS        # lone runs: one after another, no server

A request's image is named by the sha256 of its pixels, (H, W, 3) uint8 in rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import runtimes
from runtimes.pipeline.diffusion import Pipeline
from tests.serving.load_client import STEPS, SUBJECTS

SIDE, STRENGTH = 64, 0.6
SCHEDULERS = (None, None, "euler", "dpm++", "euler-ancestral")


@dataclass(frozen=True)
class Wanted:
    """One request.

    Attributes:
        edit: "" for none, "image" for image to image, "mask" for inpainting.
    """

    number: int
    prompt: str
    negative_prompt: str | None
    steps: int
    guidance_scale: float
    scheduler: str | None
    seed: int
    count: int
    edit: str

    def body(self) -> dict[str, Any]:
        """Fields of OpenAI's routes and ours; of an edit those of its form."""
        found = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "num_inference_steps": self.steps,
                 "guidance_scale": self.guidance_scale, "scheduler": self.scheduler, "seed": self.seed,
                 "n": self.count, "strength": STRENGTH if self.edit else None}
        return {name: value for name, value in found.items() if value is not None}

    def files(self) -> dict[str, tuple[str, bytes, str]]:
        """Of an edit's form; a mask is transparent where the image is painted anew."""
        found = {"image": ("image.png", png(source(self.number)), "image/png")}
        if self.edit == "mask":
            alpha = Image.fromarray(np.where(painted(self.number), 0, 255).astype(np.uint8))
            mask = source(self.number).copy()
            mask.putalpha(alpha)
            found["mask"] = ("mask.png", png(mask), "image/png")
        return found

    def lone(self, pipeline: Pipeline) -> list[str]:
        """Digests of the images that a pipeline makes of it alone."""
        fields: dict[str, Any] = {
            "negative_prompt": self.negative_prompt, "steps": self.steps, "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler, "seed": self.seed, "images_per_prompt": self.count}
        if self.edit:
            fields |= {"image": source(self.number), "strength": STRENGTH}
        if self.edit == "mask":
            fields["mask"] = Image.fromarray(np.where(painted(self.number), 255, 0).astype(np.uint8))
        return [digest(image) for image in pipeline(self.prompt, **fields)]


def wanted(number: int) -> Wanted:
    """The request of a number."""
    chance = random.Random(number)
    edit = chance.choice(("image", "mask")) if chance.random() < 0.15 else ""
    return Wanted(number, f"{chance.choice(SUBJECTS)} {number}", chance.choice((None, None, "blue")),
                  chance.choice(STEPS), chance.choice((7.5, 7.5, 4.0, 1.0)), chance.choice(SCHEDULERS),
                  chance.randrange(1 << 31), chance.choice((1, 1, 1, 2)), edit)


def source(number: int) -> Image.Image:
    """The image that an edit starts from: smooth colours."""
    corners = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def painted(number: int) -> np.ndarray:
    """(64, 64) bool: where an edit paints anew: a rectangle."""
    chance, mask = random.Random(-number), np.zeros((SIDE, SIDE), bool)
    top, left = chance.randrange(0, SIDE // 2), chance.randrange(0, SIDE // 2)
    mask[top:top + SIDE // 2, left:left + SIDE // 2] = True
    return mask


def png(image: Image.Image) -> bytes:
    """As a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def digest(image: Image.Image | bytes) -> str:
    """Of the pixels of an image or a file."""
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return hashlib.sha256(np.ascontiguousarray(opened.convert("RGB")).tobytes()).hexdigest()


# Bodies of /v1/images/generations that are refused with 4xx.
BAD_BODIES: tuple[bytes, ...] = (
    b"", b"{", b"[]", b'"a cat"', b"{}", b'{"prompt": 3}', b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "n": 100000}',
    b'{"prompt": "a", "num_inference_steps": -1}', b'{"prompt": "a", "num_inference_steps": 1e9}',
    b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "guidance_scale": Infinity}',
    b'{"prompt": "a", "size": "7x7"}', b'{"prompt": "a", "size": "100000x100000"}', b'{"prompt": "a", "seed": "x"}',
    b'{"prompt": "a", "scheduler": "none such"}', b'{"prompt": "a", "model": "none such"}',
    b'{"prompt": "a", "stream": "perhaps"}', b'{"prompt": "a", "partial_images": 99, "stream": true}',
    b'{"prompt": "a", "no_such_field": 1}', b'{"prompt": "\xff\xfe"}', b'{"prompt": "a", "background": "transparent"}')


def main() -> None:
    """Lone runs of the numbers on stdin; prints the digests of each."""
    pipeline = runtimes.load(Path(sys.argv[1]))
    print(json.dumps({number: wanted(number).lone(pipeline) for number in json.load(sys.stdin)}))


if __name__ == "__main__":
    main()
