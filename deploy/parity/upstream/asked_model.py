"""A record of what diffusers is asked to load. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Upstream:
    """A model as its user has it.

    Attributes:
        folder: of the pipeline.
        vae: folder of the autoencoder in place of the model's own, or None.
        loras: files with their scales.
        embeddings: files with the token that each is given, empty for the file's own.
        variant: of the weight files, empty for none.
    """

    folder: Path
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    embeddings: tuple[tuple[Path, str], ...] = ()
    variant: str = ""

    def files(self) -> list[Path]:
        """Every file that decides what diffusers loads, weights left out: configs, tokenizers, adapters."""
        folders = [self.folder] if self.vae is None else [self.folder, self.vae]
        texts = [file for folder in folders for file in sorted(folder.rglob("*"))
                 if file.suffix in (".json", ".txt", ".model") and file.is_file()]
        return [*texts, *(file for file, _ in (*self.loras, *self.embeddings))]
