"""Single-file checkpoints (CompVis, A1111) through diffusers' loaders, with local configs: nothing is downloaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from exporters.quiet import quiet
from runtimes.errors import InputError

# Parts of diffusers' pipelines that no bundle uses and that a single file does not hold.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def convert_single_file(file: Path, configs: Path, pipeline_class: str, out: Path) -> None:
    """Write a checkpoint as a diffusers folder.

    Args:
        file: .safetensors.
        configs: diffusers folder with the configs and tokenizers of the same architecture.
        pipeline_class: of diffusers.
        out: an empty folder.

    Raises:
        InputError: diffusers cannot read it under these configs.
    """
    import diffusers

    kind: Any = getattr(diffusers, pipeline_class)
    accepted = inspect.signature(kind.__init__).parameters
    parts = {name: None for name in _UNUSED if name in accepted}
    if not hasattr(kind, "from_single_file"):
        raise InputError(f"{pipeline_class} has no single-file form", where=str(configs), fix="give a diffusers folder")
    try:
        with quiet():
            pipe = kind.from_single_file(str(file), config=str(configs), local_files_only=True, **parts)
    except Exception as error:  # each loader raises what its dictionaries, shapes and configs happen to raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"diffusers cannot read it as a {pipeline_class}: {type(error).__name__}: {line:.200}",
                         where=str(file), fix="give the --configs of the architecture it was trained with") from error
    with quiet():
        pipe.save_pretrained(out)
