"""`adapters`: merges LoRA files into the weights or lays them beside, and adds textual inversions to text encoders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step
from runtimes.adapters.lora_files import Factors, read_factors
from runtimes.adapters.lora_inputs import own_file, side_by_side
from runtimes.bundle.details import LoraInputs, SourceDetails
from runtimes.bundle.folder import Bundle, link_or_copy, record_of, records_below
from runtimes.bundle.manifest import Component, FileRecord, Manifest
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec
    from exporters.adapters.textual_inversion import Embedding

SWAP = "swap"


class Adapters(Pass):
    """What it leaves is what parity is measured against. The manifest has each file's name, scale and hash."""

    name: ClassVar[str] = "adapters"
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "safetensors", "tokenizers")
    verify: ClassVar[bool] = False
    defines_source: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Read the files' headers; which components they change."""
        if not spec.lora and not spec.embedding:
            return Skip("no adapters")
        from exporters.adapters.lora_differences import differences
        from exporters.adapters.textual_inversion import encoder_widths, read_embedding
        from runtimes.adapters.lora_files import networks_of, parse_lora

        for name, component in before.components.items():
            if component.format != "safetensors":
                raise InputError(f"{name} is {component.format}, expected safetensors", where="pass adapters",
                                 fix="adapters come before export")
        config: dict[str, Any] = {"lora": [], "embedding": [], "lora_mode": spec.lora_mode}
        files: dict[str, str] = {}
        changed: dict[str, None] = {}
        grown: dict[str, int] = {}
        for option in spec.lora:
            file, scale = parse_lora(option)
            touched = networks_of(file)
            _refuse_absent(touched, before, file)
            changed |= dict.fromkeys(_with_entries(touched, before))
            record = record_of(file)
            files[record.sha256] = str(file)
            config["lora"].append({"file": file.name, "sha256": record.sha256, "scale": scale,
                                   "components": list(touched), "differs_from_diffusers": list(differences(file))})
        for option in spec.embedding:
            file, token = parse_embedding(option)
            embedding = read_embedding(file, token, encoder_widths(before))
            _refuse_absent(tuple(embedding.keys), before, file)
            changed |= dict.fromkeys(map(before.pipeline.adapted, embedding.keys))
            for encoder, width in embedding.widths.items():
                name = before.pipeline.adapted(encoder)
                grown[name] = grown.get(name, 0) + embedding.vectors[encoder] * width
            record = record_of(file)
            files[record.sha256] = str(file)
            config["embedding"].append({"file": file.name, "sha256": record.sha256, "token": embedding.token,
                                        "vectors": max(embedding.vectors.values()),
                                        "components": dict(embedding.vectors)})
        components = {
            name: replace(c, precision="fp32", files={}, file=f"components/{_folder(c)}/model.safetensors",
                          parameters=c.parameters + grown.get(name, 0))
            if name in changed else c for name, c in before.components.items()}
        names = ", ".join(entry["file"] for kind in ("lora", "embedding") for entry in config[kind])
        reads = {name: (name,) for name in sorted(changed)}
        return Step(self.name, self.version, config, reads, replace(before, components=components),
                    f"{'lay' if spec.lora_mode == SWAP else 'merge'} {names} "
                    f"{'beside' if spec.lora_mode == SWAP else 'into'} {', '.join(reads)}", files).recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Load one network, change its weights, write it in float32."""
        from safetensors.torch import save_file

        from exporters.adapters.lora_merging import levels_of, matrices_of, merge
        from exporters.adapters.textual_inversion import add_words
        from exporters.source.networks import load_module

        before, planned = source.component(name), step.after.components[name]
        folder, target = source.file(before.file).parent, out / "components" / _folder(before)
        details, roles = before.details_as(SourceDetails), source.manifest.pipeline
        network, reader = roles.adapter(name), roles.text_encoder(name)
        module = load_module(folder, details.library, before.class_name)
        target.mkdir(parents=True)
        if step.config["lora_mode"] == SWAP:
            levels, shapes = levels_of(module), matrices_of(module)
            factors = _factors(step, network, shapes, levels)
            for place, found in factors.items():
                found.delta(shapes[place], found.key)  # refuses what does not fit
                if len(shapes[place]) > 2 and step.after.target == "openvino":
                    raise InputError(f"{found.key} changes a convolution; OpenVINO computes none whose weights are "
                                     "inputs", where=f"pass adapters, {name}", fix="use --lora-mode merge")
            if factors:
                lora = LoraInputs(targets={place: shapes[place] for place in factors}, levels=levels,
                                  rank=max(len(found.down) for found in factors.values()))
                details = replace(details, lora=lora)
        else:
            for entry in step.config["lora"]:
                if network in entry["components"]:
                    merge(module, network, Path(step.files[entry["sha256"]]), entry["scale"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if step.config["embedding"] and reader is not None:
            config["vocab_size"] = add_words(module, network, _words(step, source.manifest),
                                             source.path / reader.tokenizer)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(weights, target / "model.safetensors")
        return replace(planned, files=records_below(target, out), details=details)

    def write_files(self, step: Step, source: Bundle, out: Path) -> dict[str, FileRecord]:
        """Tokenizers with the new words, LoRAs that are not merged; everything else as it is."""
        from exporters.adapters.textual_inversion import extend_tokenizer

        words = _words(step, source.manifest)
        files = dict(source.manifest.files)
        for reader in source.manifest.pipeline.conditioner.encoders if words else ():
            extend_tokenizer(source.path / reader.tokenizer, reader.adapter, words, out / reader.tokenizer)
            files |= records_below(out / reader.tokenizer, out)
        for name in files:
            if not (out / name).exists():
                link_or_copy(source.path / name, out / name)
        return files | self._write_loras(step, source, out)

    def _write_loras(self, step: Step, source: Bundle, out: Path) -> dict[str, FileRecord]:
        """The LoRAs of each component as one, to be fed to its graph."""
        if step.config["lora_mode"] != SWAP:
            return {}
        from exporters.adapters.lora_merging import levels_of, matrices_of, write_factors
        from exporters.source.networks import empty_module

        for name in step.reads:
            before, network = source.component(name), source.manifest.pipeline.adapter(name)
            library = before.details_as(SourceDetails).library
            module, _ = empty_module(source.file(before.file).parent, library, before.class_name)
            if factors := _factors(step, network, matrices_of(module), levels_of(module)):
                write_factors(factors, network, out / own_file(name))
        return records_below(out / own_file("").partition("/")[0], out)


def _factors(step: Step, network: str, modules: Iterable[str], levels: Any) -> dict[str, Factors]:
    """All LoRAs of a step for one network, side by side."""
    return side_by_side([read_factors(Path(step.files[entry["sha256"]]), network, entry["scale"], modules, levels)
                         for entry in step.config["lora"] if network in entry["components"]])


def _words(step: Step, source: Manifest) -> list[Embedding]:
    """The embeddings of a step."""
    from exporters.adapters.textual_inversion import encoder_widths, read_embedding

    return [read_embedding(Path(step.files[entry["sha256"]]), entry["token"], encoder_widths(source))
            for entry in step.config["embedding"]]


def parse_embedding(option: str) -> tuple[Path, str]:
    """Read `FILE[:TOKEN]`."""
    name, colon, token = option.rpartition(":")
    return (Path(name), token) if colon and name.endswith(".safetensors") else (Path(option), "")


def _folder(component: Component) -> str:
    return component.details.source_component


def _with_entries(touched: tuple[str, ...], before: Manifest) -> list[str]:
    """Components that share the weights of those that an adapter touches: the denoiser's shallow entry."""
    parts = {_folder(before.components[before.pipeline.adapted(name)]) for name in touched}
    return [name for name, component in before.components.items() if _folder(component) in parts]


def _refuse_absent(touched: tuple[str, ...], before: Manifest, file: Path) -> None:
    if absent := [name for name in touched if before.pipeline.adapted(name) not in before.components]:
        raise InputError(f"it changes the {absent[0]}, which this model does not have", where=str(file),
                         fix="use an adapter that was trained for this architecture")
