"""Reads a diffusers pipeline folder without torch: configs parsed, weight files found and checked, nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporters.source.weight_files import find_weights
from runtimes.bundle.folder import link_or_copy
from runtimes.bundle.roles import ModeFacts
from runtimes.bundle.safetensors_reader import read_header
from runtimes.errors import InputError

MODEL_INDEX = "model_index.json"
_LIBRARIES = {"diffusers": "diffusers", "transformers": "transformers", "stable_diffusion": "diffusers",
              "latent_diffusion": "diffusers"}
# diffusers' own classes that are models of transformers, and loaded by its rules
_TRANSFORMERS_LOAD = ("LDMBertModel", "StableDiffusionSafetyChecker")


@dataclass(frozen=True)
class ComponentSource:
    """One network of the pipeline on disk.

    Attributes:
        library, class_name: as model_index.json names them.
        config: config.json.
        weights: safetensors files, sorted; more than one if sharded.
        index: the shards' index, if sharded.
    """

    name: str
    library: str
    class_name: str
    folder: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    index: Path | None = None

    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype ("F32", "F16", ...) and shape of every tensor, from the headers alone."""
        return {
            key: (entry["dtype"], tuple(entry["shape"]))
            for file in self.weights
            for key, entry in read_header(file).items()
        }

    @property
    def parameters(self) -> int:
        """Number of weights in the files."""
        total = 0
        for _, shape in self.headers().values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


@dataclass(frozen=True)
class Source:
    """A pipeline on disk.

    Attributes:
        pipeline_class: `_class_name` of model_index.json.
        family: name of the family that class belongs to.
        components: networks that the family needs, by their name in model_index.json.
        tokenizers: tokenizer folders by name.
        scheduler_class: class named for the scheduler; scheduler_config: its config.
        ignored: entries of model_index.json that are not used (safety_checker, feature_extractor, ...).
        options: the pipeline's own settings in model_index.json (requires_aesthetics_score, ...).
        modes: what diffusers' class for a mode does by default, once `diffusers_pipeline.as_loaded` asked it.
        variant: of the weight files, or "".
        notes: what diffusers corrected in the configs, for the user.
    """

    path: Path
    pipeline_class: str
    family: str
    components: Mapping[str, ComponentSource]
    tokenizers: Mapping[str, Path]
    scheduler_class: str
    scheduler_config: Mapping[str, Any]
    ignored: tuple[str, ...] = field(default=())
    options: Mapping[str, Any] = field(default_factory=dict)
    modes: Mapping[str, ModeFacts] = field(default_factory=dict)
    variant: str = ""
    notes: tuple[str, ...] = ()

    def tokenizer_config(self, name: str) -> Mapping[str, Any]:
        """tokenizer_config.json of one tokenizer, empty if it has none.

        Raises:
            InputError: not valid JSON.
        """
        file = self.tokenizers[name] / "tokenizer_config.json"
        return read_json(file) if file.is_file() else {}

    def with_component(self, name: str) -> Source:
        """The same with one more network of model_index.json, which its family does without.

        Raises:
            InputError: the pipeline has none of that name, or its files are missing or unusable.
        """
        entry = read_json(self.path / MODEL_INDEX).get(name)
        if not isinstance(entry, list) or not names_a_class(entry) or not (self.path / name).is_dir():
            raise InputError(f"the pipeline has no {name}", where=str(self.path / MODEL_INDEX),
                             fix=f"copy the whole pipeline again, or build without its {name.replace('_', ' ')}")
        return replace(self, components={**self.components, name: read_component(self.path, name, entry, self.variant)})

    def weight_files(self) -> dict[str, Path]:
        """Every weight file by its path relative to the pipeline."""
        return {f.relative_to(self.path).as_posix(): f for c in self.components.values() for f in c.weights}


def names_a_class(entry: Any) -> bool:
    """Whether an entry of model_index.json is a pair of library and class."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def library_of(pipeline: Path, name: str, entry: list[str]) -> str:
    """The library of an entry of model_index.json; diffusers would import any other, from the folder itself too.

    Raises:
        InputError: another than diffusers and transformers.
    """
    library = _LIBRARIES.get(entry[0])
    if library is None:
        raise InputError(f"{name} comes from the library {entry[0]!r}", where=str(pipeline / MODEL_INDEX),
                         fix="only classes of diffusers and transformers are loaded; custom code is never run")
    return library


def read_component(pipeline: Path, name: str, entry: list[str], variant: str) -> ComponentSource:
    """One network of a pipeline folder.

    Raises:
        InputError: its config or weights are missing or unusable.
    """
    folder, library = pipeline / name, library_of(pipeline, name, entry)
    config = read_json(folder / "config.json")
    loader = "transformers" if entry[1] in _TRANSFORMERS_LOAD else library
    weights, index = find_weights(folder, loader, variant)
    return ComponentSource(name, library, entry[1], folder, config, weights, index)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file.name} is missing", where=str(file.parent),
                         fix="copy the whole pipeline again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(file), fix="copy the file again") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from error
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {type(value).__name__}", where=str(file))
    return value


def link_component(component: ComponentSource, out_folder: Path) -> tuple[Path, ...]:
    """Hard-link config.json and weights into a folder, under canonical names.

    Names: `model.safetensors`, or the shards by `model-00001-of-00002.safetensors` with their index rewritten.

    Returns:
        the files written, config.json first; the second is the entry file (weights or index).
    """
    config = out_folder / "config.json"
    link_or_copy(component.folder / "config.json", config)
    if component.index is None:
        weights = out_folder / "model.safetensors"
        link_or_copy(component.weights[0], weights)
        return config, weights
    count = len(component.weights)
    names = {file.name: f"model-{i:05}-of-{count:05}.safetensors" for i, file in enumerate(component.weights, 1)}
    index = read_json(component.index)
    index["weight_map"] = {key: names[shard] for key, shard in sorted(index["weight_map"].items())}
    index_file = out_folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shards = []
    for file in component.weights:
        shards.append(out_folder / names[file.name])
        link_or_copy(file, shards[-1])
    return config, index_file, *shards
