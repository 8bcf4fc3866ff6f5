"""Writing a case's model folder: links to the base's files, edited JSON, weights in other files and names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.fuzz.case import ABSENT, Model
from tests.fuzz.models import base
from tests.fuzz.schedulers import TRAINED_BETAS

Tensors = dict[str, Any]


def write(model: Model, out: Path) -> Path:
    """The folder of a case; files that it changes are its own, all others are links."""
    shutil.copytree(base(model.kind, model.build), out, copy_function=os.link)
    if model.words:
        _learn(out, model.words)
    if model.old_tokenizer:
        for folder in sorted(out.glob("tokenizer*")):
            _write_old_tokenizer(folder)
    for name in {*model.layouts, *model.dtypes, *model.old_names}:
        _rewrite(out / name, model.layouts.get(name, "plain"), model.dtypes.get(name), name in model.old_names)
    for file, changes in model.edits.items():
        if file.startswith("scheduler/"):
            if changes.get("trained_betas") == TRAINED_BETAS:
                changes = {**changes, "trained_betas": [round(0.0005 + 0.00001 * i, 6) for i in range(1000)]}
            replace_text(out / file, json.dumps(changes))
        elif changes:
            edit(out / file, changes)
    return out


def edit(file: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON file, not of the base's that it may be a link to."""
    content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    replace_text(file, json.dumps({k: v for k, v in content.items() if v != ABSENT}, indent=1))


def replace_text(file: Path, text: str) -> None:
    """A new file in place of a link."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


# ---- weights ----------------------------------------------------------------------------------------------------


def _rewrite(folder: Path, layout: str, dtype: str | None, old_names: bool) -> None:
    import torch

    file = next(folder.glob("*.safetensors"))
    tensors: Tensors = load_file(file)
    file.unlink()
    if old_names:
        tensors = _old_text_names(tensors) if folder.name.startswith("text_encoder") else _old_vae_names(tensors)
    if dtype is not None:
        wanted = getattr(torch, dtype)
        tensors = {k: v.to(wanted) if v.is_floating_point() else v for k, v in tensors.items()}
    LAYOUTS[layout](folder, file.stem, {k: v.contiguous() for k, v in tensors.items()})


def _old_text_names(tensors: Tensors) -> Tensors:
    """As releases of transformers before 5 wrote them, with a buffer that is computed today."""
    import torch

    named = {key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
             for key, value in tensors.items()}
    table = named["text_model.embeddings.position_embedding.weight"]
    return {**named, "text_model.embeddings.position_ids": torch.arange(len(table))[None]}


def _old_vae_names(tensors: Tensors) -> Tensors:
    """As releases of diffusers before 0.13 called the parts of an attention block."""
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old(key: str) -> str:
        new = next((n for n in names if n in key), None)
        return key if new is None else key.replace(new, names[new])

    return {old(key): value for key, value in tensors.items()}


def _other(tensors: Tensors) -> Tensors:
    """Weights that make another image: what a stale file holds."""
    return {key: value * 0.8 if value.is_floating_point() else value for key, value in tensors.items()}


def _single(folder: Path, stem: str, tensors: Tensors, variant: str = "") -> None:
    save_file(tensors, folder / f"{stem}{variant}.safetensors", metadata={"format": "pt"})


def _shards(folder: Path, stem: str, tensors: Tensors, variant: str = "", count: int = 2) -> list[Path]:
    keys, files = sorted(tensors), []
    weight_map: dict[str, str] = {}
    for i in range(count):
        part = keys[i * len(keys) // count : (i + 1) * len(keys) // count]
        files.append(folder / f"{stem}{variant}-{i + 1:05}-of-{count:05}.safetensors")
        save_file({key: tensors[key] for key in part}, files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, files[-1].name)
    size = sum(t.nbytes for t in tensors.values())
    name = f"{stem}.safetensors.index{variant}.json"
    replace_text(folder / name, json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return files


def _shards_beside_stale(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, _other(tensors))
    _shards(folder, stem, tensors)


def _shards_beside_the_same(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, tensors)
    _shards(folder, stem, tensors)


def _shard_missing(folder: Path, stem: str, tensors: Tensors) -> None:
    _shards(folder, stem, tensors)[1].unlink()


def _stray_shard(folder: Path, stem: str, tensors: Tensors) -> None:
    """A third shard of an earlier upload, which the index does not name."""
    _shards(folder, stem, _other(tensors), count=3)
    _shards(folder, stem, tensors)


def _variant_beside(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, tensors)
    _single(folder, stem, _other(tensors), ".fp16")


def _two_variants(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, tensors, ".fp16")
    _single(folder, stem, _other(tensors), ".non_ema")


def _broken_pickle_beside(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, tensors)
    names = {"model": "pytorch_model.bin"}
    (folder / names.get(stem, f"{stem}.bin")).write_bytes(b"not a pickle")


def _pickle_alone(folder: Path, stem: str, tensors: Tensors) -> None:
    import torch

    names = {"model": "pytorch_model.bin"}
    torch.save(tensors, folder / names.get(stem, f"{stem}.bin"))


def _truncated(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, tensors)
    file = folder / f"{stem}.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def _lost_tensor(folder: Path, stem: str, tensors: Tensors) -> None:
    _single(folder, stem, {key: tensors[key] for key in sorted(tensors)[:-1]})


# How weights lie in files -> what writes them. "plain" is how diffusers saves today.
LAYOUTS: Mapping[str, Callable[[Path, str, Tensors], Any]] = {
    "plain": _single,
    "shards": _shards,
    "shards beside a stale file": _shards_beside_stale,
    "shards beside the same in one": _shards_beside_the_same,
    "shards and a stray one": _stray_shard,
    "shard missing": _shard_missing,
    "variant alone": lambda folder, stem, tensors: _single(folder, stem, tensors, ".fp16"),
    "variant in shards": lambda folder, stem, tensors: _shards(folder, stem, tensors, ".fp16"),
    "variant beside": _variant_beside,
    "two variants": _two_variants,
    "broken pickle beside": _broken_pickle_beside,
    "pickle alone": _pickle_alone,
    "truncated": _truncated,
    "lost tensor": _lost_tensor,
}
UNREADABLE = ("shard missing", "truncated", "lost tensor", "two variants")
STALE = ("shards beside a stale file",)  # refused, since nobody can know which of them is meant
OF_VARIANTS = ("variant alone", "variant in shards", "two variants")


# ---- tokenizers -------------------------------------------------------------------------------------------------


def _learn(folder: Path, words: Mapping[str, int]) -> None:
    """Add words to every tokenizer and text encoder of a folder, as `load_textual_inversion` and saving leave them."""
    import torch
    from transformers import CLIPTokenizer

    for place in sorted(folder.glob("tokenizer*")):
        tokenizer = CLIPTokenizer.from_pretrained(place)
        tokens = [t for word, count in words.items() for t in (word, *(f"{word}_{i}" for i in range(1, count)))]
        added = tokenizer.add_tokens(tokens)
        for file in place.iterdir():
            file.unlink()
        tokenizer.save_pretrained(place)
        encoder = folder / place.name.replace("tokenizer", "text_encoder")
        file = next(encoder.glob("*.safetensors"))
        tensors: Tensors = load_file(file)
        key = next(k for k in tensors if k.endswith("token_embedding.weight"))
        rows = torch.randn(added, tensors[key].shape[1], generator=torch.Generator().manual_seed(5)) * 0.5
        tensors[key] = torch.cat([tensors[key][: len(tokenizer) - added], rows])
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
        edit(encoder / "config.json", {"vocab_size": len(tensors[key])})


def _write_old_tokenizer(folder: Path) -> None:
    """The files that transformers 4 wrote: vocabulary and merges apart, added tokens in files of their own."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = whole["added_tokens"]
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: config[name] for name in names if name in config}
    for file in folder.iterdir():
        file.unlink()
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    replace_text(folder / "vocab.json", json.dumps(whole["model"]["vocab"]))
    replace_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    replace_text(folder / "special_tokens_map.json", json.dumps(special))
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    decoder = {str(token["id"]): {key: token[key] for key in flags} for token in added}
    keep = {"model_max_length": config.get("model_max_length", 16), "tokenizer_class": "CLIPTokenizer", **special}
    replace_text(folder / "tokenizer_config.json", json.dumps({**keep, "added_tokens_decoder": decoder}))
    new = {token["content"]: token["id"] for token in added if token["content"] not in whole["model"]["vocab"]}
    if new:
        replace_text(folder / "added_tokens.json", json.dumps(new))
