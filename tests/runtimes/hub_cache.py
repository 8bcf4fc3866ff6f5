"""The layout in which the Hugging Face Hub's client stores a repository."""

from __future__ import annotations

import os
from pathlib import Path


def as_hub_snapshot(folder: Path, repository: Path) -> Path:
    """The bundle as `huggingface_hub.snapshot_download` leaves it: a folder of links to blobs beside it."""
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0123456789" * 4)
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / str(number)).write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot
