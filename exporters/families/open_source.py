"""Opens a pipeline folder of a known family and checks that it holds what the family needs. No weight is read."""

from __future__ import annotations

from pathlib import Path

from exporters.families import family_of
from exporters.source.model_folder import MODEL_INDEX, Source, library_of, names_a_class, read_component, read_json
from runtimes.errors import InputError


def open_source(path: Path | str, variant: str = "") -> Source:
    """Read a pipeline folder.

    Args:
        path: holds model_index.json.
        variant: of the weight files, such as "fp16"; a component without files of it has its plain ones.

    Raises:
        InputError: no such folder, no or broken model_index.json, an unknown pipeline class, a component whose
            folder, config or weights are missing or truncated, or weights as pickle only.
    """
    folder = Path(path)
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "no such folder"
        raise InputError(kind, where=str(folder), fix="give a diffusers pipeline folder, the one with model_index.json"
                         + ("; `convert` makes one of a single-file checkpoint" if folder.exists() else ""))
    index_file = folder / MODEL_INDEX
    if not index_file.is_file():
        raise InputError(f"it holds no {MODEL_INDEX}", where=str(folder),
                         fix="give a diffusers pipeline folder; `pipe.save_pretrained(folder)` writes one")
    index = read_json(index_file)
    family = family_of(str(index.get("_class_name")), str(index_file))
    entries = {name: entry for name, entry in index.items() if names_a_class(entry)}
    present = tuple(name for name in family.optional if name in entries)
    tokenizers = (*family.tokenizers, *(name for name in present if name.startswith("tokenizer")))
    networks = (*family.source_components, *(name for name in present if name not in tokenizers))
    for name in (*networks, *tokenizers, "scheduler"):
        if name not in entries:
            raise InputError(f"{name} is missing", where=str(index_file), fix="save the whole pipeline again")
        if not (folder / name).is_dir():
            raise InputError(f"the folder {name} is missing", where=str(folder), fix="copy the whole pipeline again")
        library_of(folder, name, entries[name])
    used = {*networks, *tokenizers, "scheduler"}
    source = Source(
        path=folder,
        pipeline_class=index["_class_name"],
        family=family.name,
        components={name: read_component(folder, name, entries[name], variant) for name in networks},
        tokenizers={name: folder / name for name in tokenizers},
        scheduler_class=entries["scheduler"][1],
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        ignored=tuple(sorted(set(entries) - used)),
        options={k: v for k, v in index.items()
                 if isinstance(v, bool | int | float | str | None) and not k.startswith("_")},
        variant=variant,
    )
    if variant and not any(f".{variant}" in name for name in source.weight_files()):
        raise InputError(f"it holds no weights of the variant {variant!r}", where=str(folder),
                         fix="leave --variant out, or give one that it has")
    return source
