"""Bundles of ONNX graphs of a few nodes, for tests of what serves them; another of the same kind has another digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from runtimes.bundle.folder import Bundle
from tests.runtimes.fakes import write_pipeline_bundle
from tests.runtimes.vocabulary import make_vocabulary


def tiny_bundle(folder: Path) -> Path:
    """Write a bundle of 32 by 32 to 64 by 64 pixels."""
    from transformers import CLIPTokenizer

    from runtimes.text.clip_tokenizer import prepare_tokenizer

    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5).save_pretrained(folder.parent / "source")
    prepare_tokenizer(folder.parent / "source", folder / "tokenizer")
    write_pipeline_bundle(folder, len(vocab) + 1)
    return folder


def copied(bundle: Path, folder: Path, mark: str = "") -> Path:
    """A copy, with another digest if marked."""
    shutil.copytree(bundle, folder)
    if mark:
        remark(folder, mark)
    return folder


def remark(folder: Path, mark: str) -> str:
    """Give a bundle another digest, as another build of it would have; written to a new file and renamed."""
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    content["tools"]["mark"] = mark
    (folder / "manifest.new").write_text(json.dumps(content), encoding="utf-8")
    (folder / "manifest.new").replace(folder / "manifest.json")
    return Bundle.open(folder).manifest.digest
