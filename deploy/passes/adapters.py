"""`adapters`: LoRA files merged into the weights, textual inversions added to tokenizers and text encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.plan import Pass, Planned, Skip, Step
from runtimes.bundle import Bundle, link_or_copy, record_of, records_below
from runtimes.errors import InputError
from runtimes.guidance import SHALLOW
from runtimes.manifest import Component, FileRecord, Manifest

if TYPE_CHECKING:
    from deploy.spec import BuildSpec


class Adapters(Pass):
    """What it leaves is what parity is measured against. The manifest has each file's name, scale and hash."""

    name: ClassVar[str] = "adapters"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "safetensors", "tokenizers")
    verify: ClassVar[bool] = False
    defines_source: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Read the files' headers; which components they change."""
        if not spec.lora and not spec.embedding:
            return Skip("no adapters")
        from exporters.lora import components_of
        from exporters.textual_inversion import read_embedding

        for name, component in before.components.items():
            if component.format != "safetensors":
                raise InputError(f"{name} is {component.format}, expected safetensors", where="pass adapters",
                                 fix="adapters come before export")
        config: dict[str, Any] = {"lora": [], "embedding": []}
        files: dict[str, str] = {}
        changed: dict[str, None] = {}
        grown: dict[str, int] = {}
        for option in spec.lora:
            file, scale = parse_lora(option)
            touched = components_of(file)
            _refuse_absent(touched, before, file)
            changed |= dict.fromkeys(_with_entries(touched, before))
            record = record_of(file)
            files[record.sha256] = str(file)
            config["lora"].append({"file": file.name, "sha256": record.sha256, "scale": scale,
                                   "components": list(touched)})
        for option in spec.embedding:
            file, token = parse_embedding(option)
            embedding = read_embedding(file, token)
            # A text encoder whose tokenizer knows a word without having it would read past its table.
            _refuse_absent(tuple(embedding.keys), before, file)
            changed |= dict.fromkeys(before.pipeline.text_encoders)
            for name, width in embedding.widths.items():
                grown[name] = grown.get(name, 0) + embedding.vectors * width
            record = record_of(file)
            files[record.sha256] = str(file)
            config["embedding"].append({"file": file.name, "sha256": record.sha256, "token": embedding.token,
                                        "vectors": embedding.vectors})
        components = {
            name: replace(c, precision="fp32", files={}, file=f"components/{_folder(c)}/model.safetensors",
                          parameters=c.parameters + grown.get(name, 0))
            if name in changed else c for name, c in before.components.items()}
        names = ", ".join(entry["file"] for kind in ("lora", "embedding") for entry in config[kind])
        reads = {name: (name,) for name in sorted(changed)}
        return Step(self.name, self.version, config, reads, replace(before, components=components),
                    f"merge {names} into {', '.join(reads)}", files).recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Load one network, change its weights, write it in float32."""
        from safetensors.torch import save_file

        from exporters.lora import merge
        from exporters.modules import load_module
        from exporters.textual_inversion import add_words, next_token, read_embedding

        before, planned = source.component(name), step.after.components[name]
        folder, target = source.file(before.file).parent, out / "components" / _folder(before)
        network = "unet" if name == SHALLOW else name
        module = load_module(folder, before.details["library"], before.class_name)
        target.mkdir(parents=True)
        for entry in step.config["lora"]:
            if network in entry["components"]:
                merge(module, network, Path(step.files[entry["sha256"]]), entry["scale"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if step.config["embedding"] and name in source.manifest.pipeline.text_encoders:
            words = [read_embedding(Path(step.files[e["sha256"]]), e["token"]) for e in step.config["embedding"]]
            tokenizer = source.path / name.replace("text_encoder", "tokenizer")
            config["vocab_size"] = add_words(module, name, words, next_token(tokenizer))
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(weights, target / "model.safetensors")
        return replace(planned, files=records_below(target, out))

    def write_files(self, step: Step, source: Bundle, out: Path) -> dict[str, FileRecord]:
        """Tokenizers with the new words; everything else as it is."""
        from exporters.textual_inversion import extend_tokenizer, read_embedding

        words = [read_embedding(Path(step.files[e["sha256"]]), e["token"]) for e in step.config["embedding"]]
        folders = {name.replace("text_encoder", "tokenizer") for name in source.manifest.pipeline.text_encoders}
        files = dict(source.manifest.files)
        for folder in sorted(folders) if words else ():
            extend_tokenizer(source.path / folder, words, out / folder)
            files |= records_below(out / folder, out)
        for name in files:
            if not (out / name).exists():
                link_or_copy(source.path / name, out / name)
        return files


def parse_lora(option: str) -> tuple[Path, float]:
    """Read `FILE[:SCALE]`.

    Raises:
        InputError: a scale that is no finite number.
    """
    name, colon, text = option.rpartition(":")
    if not colon or text.endswith(".safetensors"):
        return Path(option), 1.0
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not abs(scale) < float("inf"):
        raise InputError(f"the scale {text!r} is not a number", where=f"--lora {option}", fix="write FILE:0.8")
    return Path(name), scale


def parse_embedding(option: str) -> tuple[Path, str]:
    """Read `FILE[:TOKEN]`."""
    name, colon, token = option.rpartition(":")
    return (Path(name), token) if colon and name.endswith(".safetensors") else (Path(option), "")


def _folder(component: Component) -> str:
    return str(component.details["source_component"])


def _with_entries(touched: tuple[str, ...], before: Manifest) -> list[str]:
    """Components that share the weights of those that an adapter touches: the U-Net's shallow entry."""
    parts = {_folder(before.components[name]) for name in touched}
    return [name for name, component in before.components.items() if _folder(component) in parts]


def _refuse_absent(touched: tuple[str, ...], before: Manifest, file: Path) -> None:
    known: Mapping[str, Component] = before.components
    if absent := [name for name in touched if name not in known]:
        raise InputError(f"it changes the {absent[0]}, which this model does not have", where=str(file),
                         fix="use an adapter that was trained for this architecture")
