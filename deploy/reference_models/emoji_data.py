"""The training set: Noto Color Emoji bitmaps with their CLDR names. Needed for training and evaluation, never to run.

`subjects.json` (shipped) lists the subjects; the images themselves come from the Debian package
`fonts-noto-color-emoji` (SIL Open Font License 1.1) and are not redistributed, apart from the 32x32
contact sheet `gallery.png` by which retrieval is scored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtimes.errors import InputError

HERE = Path(__file__).parent
SUBJECTS_FILE = HERE / "subjects.json"
FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
IMAGE_SIZE = 64
BITMAP_SIZE = 109  # the only size at which Noto's CBDT bitmaps exist; they measure 136x128
CANVAS = 136


@dataclass(frozen=True)
class Subject:
    """One emoji: the character, the lower-case CLDR short name used as its prompt, its Unicode group."""

    character: str
    name: str
    group: str


def load_subjects() -> list[Subject]:
    """Read the shipped list of subjects, in gallery order."""
    return [Subject(**row) for row in json.loads(SUBJECTS_FILE.read_text(encoding="utf-8"))]


def render(character: str, font: Any, size: int = IMAGE_SIZE) -> np.ndarray[Any, Any]:
    """One emoji centred on a square canvas: RGBA pixels (size, size, 4) uint8, alpha premultiplied."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    left, top, right, bottom = font.getbbox(character)
    origin = ((CANVAS - (right - left)) // 2 - left, (CANVAS - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(origin, character, font=font, embedded_color=True)
    # Premultiplied resampling: otherwise the colour of transparent pixels bleeds into the edges.
    return np.asarray(canvas.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS))


def load_font() -> Any:
    """Open the emoji font.

    Raises:
        InputError: the Debian package is not installed.
    """
    if not FONT_FILE.is_file():
        raise InputError(
            what="the emoji font used for training is not installed",
            where=str(FONT_FILE),
            fix="apt-get install fonts-noto-color-emoji",
        )
    return ImageFont.truetype(str(FONT_FILE), BITMAP_SIZE)


def render_all(characters: list[str], size: int = IMAGE_SIZE) -> np.ndarray[Any, Any]:
    """Many emoji: RGBA pixels (N, size, size, 4) uint8, alpha premultiplied."""
    font = load_font()
    return np.stack([render(character, font, size) for character in characters])


def on_white(rgba: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Composite premultiplied RGBA pixels (..., 4) uint8 on white: (..., 3) uint8."""
    colour, alpha = rgba[..., :3].astype(np.int32), rgba[..., 3:].astype(np.int32)
    composed: np.ndarray[Any, Any] = np.clip(colour + 255 - alpha, 0, 255).astype(np.uint8)
    return composed
