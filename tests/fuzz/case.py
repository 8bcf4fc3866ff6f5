"""What one case is, as data that JSON holds: a model folder, adapters, and a request."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.bundle.manifest import from_json, to_json

ABSENT = "<absent>"  # an edited key that the file lacks


@dataclass(frozen=True)
class Model:
    """A pipeline folder: networks of tests/fuzz/models.py and what is changed in their files.

    Attributes:
        kind, build: of `models.base`.
        edits: JSON file -> key -> value.
        layouts: network -> how its weights lie in files (folders.LAYOUTS); by default one plain file.
        dtypes: network -> "float16" or "bfloat16"; by default float32.
        old_names: networks whose weights have the names of releases of 2022.
        old_tokenizer: vocab.json and merges.txt in place of tokenizer.json.
        words: tokens that tokenizer and text encoders learned before they were saved -> number of vectors.
        vae: build of another autoencoder, given as `vae=`; empty for the model's own.
    """

    kind: str = "sd"
    build: str = "plain"
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    old_names: tuple[str, ...] = ()
    old_tokenizer: bool = False
    words: Mapping[str, int] = field(default_factory=dict)
    vae: str = ""


@dataclass(frozen=True)
class Lora:
    """A LoRA file.

    Attributes:
        form: naming of its keys (adapters.FORMS).
        parts: what it changes: "attention", "feed-forward", "convolutions", "ends", "text_encoder", ...
        rank: of every module; `ranks` of "mixed" gives every second one twice that.
        alpha: how alphas are written (adapters.ALPHAS).
        metadata: what the file's metadata says in PEFT's terms (adapters.METADATA).
        oddity: a duplicate, a leftover, a missing half, ...; empty for none.
    """

    form: str = "peft"
    parts: tuple[str, ...] = ("attention",)
    rank: int = 4
    mixed_ranks: bool = False
    alpha: str = "missing"
    metadata: str = "none"
    dtype: str = "float32"
    scale: float = 1.0
    oddity: str = ""


@dataclass(frozen=True)
class Embedding:
    """A textual inversion file: its layout (adapters.EMBEDDINGS), the word, and how many vectors."""

    form: str = "diffusers"
    token: str = "<toy>"
    vectors: int = 1


@dataclass(frozen=True)
class Picture:
    """An image or a mask: what it shows, Pillow's mode, width and height, and how it is handed over.

    Attributes:
        form: "pil", "array", or a path to a file of the format "png", "jpeg" or "tiff".
        orientation: EXIF's; 1 is upright.
    """

    shows: str = "noise"
    mode: str = "RGB"
    size: tuple[int, ...] = (32, 32)
    form: str = "pil"
    orientation: int = 1


@dataclass(frozen=True)
class Request:
    """A call of the pipeline; None leaves an argument out, so that both sides take their default."""

    mode: str = "text"
    prompts: tuple[str, ...] = ("a red apple",)
    negative: tuple[str, ...] | None = None
    images_per_prompt: int = 1
    steps: int | None = 2
    guidance: float | None = None
    rescale: float = 0.0
    eta: float = 0.0
    seeds: tuple[int, ...] = (0,)
    latents: bool = False
    height: int | None = None
    width: int | None = None
    strength: float | None = None
    image: Picture | None = None
    mask: Picture | None = None
    scheduler: str | None = None
    output: str = "numpy"
    sizes: str = "none"
    last: float = 1.0


@dataclass(frozen=True)
class Case:
    """One comparison."""

    number: int
    model: Model = Model()
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    request: Request = Request()

    def save(self, file: Path) -> None:
        """Write it for `python -m tests.fuzz --replay FILE`."""
        file.write_text(json.dumps(_changed(self), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def load(file: Path) -> Case:
    """Read what `Case.save` wrote."""
    case: Case = from_json(Case, json.loads(file.read_text(encoding="utf-8")), file.name)
    return case


def _changed(value: Any) -> Any:
    """As JSON without what is at its default: a reproducer says what matters."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return [_changed(v) for v in value]
    if not dataclasses.is_dataclass(value):
        return to_json(value)
    defaults = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                for f in dataclasses.fields(value)}
    shown = {name: getattr(value, name) for name in defaults}
    return {name: _changed(v) for name, v in shown.items() if v != defaults[name]}
