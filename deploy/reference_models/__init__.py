"""The reference model: a small text-to-image latent diffusion model, trained, not random. See README.md beside this."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
GALLERY_FILE = HERE / "gallery.png"
GALLERY_COLUMNS = 28
GALLERY_TILE = 32
GUIDANCE_SCALE = 3.0


def subject_names() -> tuple[str, ...]:
    """Prompts of the training set, in the gallery's order."""
    return tuple(row["name"] for row in json.loads((HERE / "subjects.json").read_text(encoding="utf-8")))


def demo_prompts() -> tuple[str, ...]:
    """The prompts that `make demo` generates."""
    return tuple((HERE / "demo_prompts.txt").read_text(encoding="utf-8").split("\n")[:16])
