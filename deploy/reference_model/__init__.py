"""The reference model: a small text-to-image latent diffusion model, trained, not random. See README.md beside this."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
GALLERY_FILE = HERE / "gallery.png"
GALLERY_COLUMNS = 28
GALLERY_TILE = 32
GUIDANCE_SCALE = 3.0
