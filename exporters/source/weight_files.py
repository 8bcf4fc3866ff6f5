"""Finds, without torch, the weight files of a component's folder that diffusers or transformers would read.

The rules are those of `ModelMixin.from_pretrained` (diffusers/models/modeling_utils.py: an index of shards before a
single file) and of `_get_resolved_checkpoint_files` (transformers/modeling_utils.py: a single file before an index).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.bundle.safetensors_reader import read_header
from runtimes.errors import InputError

Found = tuple[tuple[Path, ...], Path | None]
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BLOCK = 1 << 24


def find_weights(folder: Path, library: str, variant: str = "") -> Found:
    """The safetensors files of a component and, if sharded, their index.

    Args:
        folder: holds them.
        library: "diffusers" or "transformers", which differ in what they prefer.
        variant: of the files, such as "fp16", if the folder has files of it; plain ones else.

    Raises:
        InputError: none of that name, other forms of the weights with other numbers in them, a missing shard, a
            truncated file, or pickle only.
    """
    if variant and not any(part[1].startswith(variant) for file in folder.iterdir()
                           if len(part := file.name.split(".")) > 1):
        variant = ""  # diffusers.pipelines.pipeline_loading_utils._identify_model_variants
    forms = {stem: [form for form in _forms(folder, stem, stem == STEMS["diffusers"], variant) if form.is_file()]
             for stem in STEMS.values()}
    own = forms[STEMS[library]]
    if not own:
        raise _nothing(folder, STEMS[library], variant, [file for files in forms.values() for file in files])
    chosen = _opened(own[0])
    for other in (file for files in forms.values() for file in files if file != own[0]):
        if (name := _different(chosen[0], _opened(other)[0])) is not None:
            raise InputError(f"{own[0].name} and {other.name} disagree about {name}", where=str(folder),
                             fix=f"remove the one that is out of date; {library} reads {own[0].name}")
    return chosen


def canonical_weights(folder: Path) -> Found | None:
    """The files of a folder that `exporters.source.model_folder.link_component` wrote, if it is one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        return _opened(index)
    return _opened(single) if single.is_file() else None


def _forms(folder: Path, stem: str, index_first: bool, variant: str) -> list[Path]:
    """What the weights may be called, the preferred first."""
    dotted = f".{variant}" if variant else ""
    single = [folder / f"{stem}{dotted}.safetensors"]
    index = [folder / f"{stem}.safetensors.index{dotted}.json"]
    if index_first and variant:
        index.append(folder / f"{stem}.safetensors{dotted}.index.json")  # diffusers' former name of it
    return index + single if index_first else single + index


def _opened(form: Path) -> Found:
    if form.suffix == ".json":
        return _shards(form), form
    read_header(form)
    return (form,), None


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    except (ValueError, AttributeError) as error:
        raise InputError(f"not a JSON object: {error}", where=str(index), fix="copy the file again") from error
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise InputError("the index has no weight_map", where=str(index), fix="copy the whole pipeline again")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"the shard {name!r} lies outside the folder", where=str(index), fix="do not use it")
        if not (index.parent / name).is_file():
            raise InputError(f"the shard {name} is missing", where=str(index.parent), fix="copy it again")
    files = tuple(index.parent / name for name in names)
    present = {key for file in files for key in read_header(file)}
    if lost := sorted(set(mapping) - present):
        raise InputError(f"{lost[0]} is in the index but in no shard", where=str(index), fix="copy it again")
    return files


def _different(one: tuple[Path, ...], other: tuple[Path, ...]) -> str | None:
    """The first weight that two forms do not hold alike, byte for byte, or None."""
    first, second = _places(one), _places(other)
    if lacking := sorted(set(first) ^ set(second)):
        return lacking[0]
    return next((name for name in sorted(first) if not _same(first[name], second[name])), None)


def _places(files: tuple[Path, ...]) -> dict[str, tuple[Path, dict[str, Any]]]:
    return {name: (file, entry) for file in files for name, entry in read_header(file).items()}


def _same(one: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]]) -> bool:
    if any(one[1][key] != other[1][key] for key in ("dtype", "shape")):
        return False
    with one[0].open("rb") as first, other[0].open("rb") as second:
        for stream, (_, entry) in ((first, one), (second, other)):
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(header + entry["data_offsets"][0])
        left = one[1]["data_offsets"][1] - one[1]["data_offsets"][0]
        while left > 0:
            count = min(left, _BLOCK)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def _nothing(folder: Path, stem: str, variant: str, others: list[Path]) -> InputError:
    """Why there are no weights to read."""
    wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    found = sorted({*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index*.json"), *others})
    variants = sorted({part[-2] for file in found if file.suffix == ".safetensors" and "-of-" not in file.name
                       and len(part := file.name.split(".")) > 2} - {variant})
    if variants:
        return InputError(f"no {wanted}, but the variant {' and '.join(variants)}", where=str(folder),
                          fix=f"choose it with --variant {variants[0]}")
    if found:
        return InputError(f"no {wanted}: it holds {found[0].name}", where=str(folder),
                          fix=f"save the pipeline again, or call the file {wanted}")
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return InputError(
            f"the weights are a pickle ({pickles[0]}), which can run code when it is read: refused", where=str(folder),
            fix="convert where you trust it: `DiffusionPipeline.from_pretrained(old)"
            ".save_pretrained(new, safe_serialization=True)`")
    return InputError("no weights: no .safetensors file", where=str(folder), fix="copy the whole pipeline again")
