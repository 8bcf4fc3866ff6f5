"""`Generated`: what a ticket ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generated:
    """What a ticket ends with.

    Attributes:
        images: as `Request.output` asks: B Pillow images, (B, H, W, 3) float32 in 0..1, or (B, C, H/f, W/f) float32.
        digest: of the bundle that made them; after a hot reload it differs from the one before.
        flagged: which images the model's safety checker flags; empty where it was not asked or there is none.
        seconds: from the first step to the last decoded image.
        batch: mean number of images that shared a denoiser call with these, themselves included.
        work_seconds: their share of the time that the device worked; company makes it less than `seconds`.
    """

    images: Any
    digest: str = ""
    flagged: tuple[bool, ...] = ()
    seconds: float = 0.0
    batch: float = 1.0
    work_seconds: float = 0.0
