"""`load`: brings the source model into a bundle under canonical names, and refuses anything broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Step
from deploy.model.source_bundle import ORIGIN_FORMAT
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, FileRecord, Manifest
from runtimes.codec.safety_checker import PREPROCESSOR_FILE, SAFETY_CHECKER
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec
    from exporters.source.model_folder import Source as PipelineSource


class Load(Pass):
    """Link configs and weights, check every tensor, rewrite tokenizers so that `tokenizers` alone reads them."""

    name: ClassVar[str] = "load"
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "safetensors", "tokenizers")
    verify: ClassVar[bool] = False
    defines_source: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every component of a diffusers folder, renamed."""
        components = {}
        for name, component in before.components.items():
            if component.format != ORIGIN_FORMAT:
                raise InputError(f"{name} is already {component.format}", where="pass load", fix="load comes first")
            part = component.details.source_component
            suffix = ".index.json" if component.file.endswith(".index.json") else ""
            components[name] = replace(component, format="safetensors", files={},
                                       file=f"components/{part}/model.safetensors{suffix}")
        after = replace(before, components=components)
        step = Step(self.name, self.version, {}, {n: (n,) for n in components}, after,
                    f"read {before.source.id} ({before.family}), check every weight")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Link one network's files and look at every weight once: all fit and are finite."""
        from exporters.source.model_folder import link_component
        from exporters.source.networks import check_weights

        planned = step.after.components[name]
        part = planned.details.source_component
        folder = out / "components" / part
        link_component(_opened(step, source).with_component(part).components[part], folder)
        try:
            check_weights(folder, planned.details_as(SourceDetails).library, planned.class_name)
        except InputError as error:
            error.where = error.where.replace(str(folder), str(source.path / part))  # not the link in the cache
            raise
        known = {source.path / file: record for file, record in source.component(name).files.items()}
        return replace(planned, files=records_below(folder, out, known))

    def write_files(self, step: Step, source: Bundle, out: Path) -> dict[str, FileRecord]:
        """Tokenizers in the one form the runtime reads, and the scheduler's config as diffusers corrects it."""
        from deploy.model.source_bundle import as_loaded
        from runtimes.text.clip_tokenizer import prepare_tokenizer

        origin = as_loaded(_opened(step, source))
        parts = {encoder.tokenizer: step.after.components[encoder.component].details.source_component
                 for encoder in step.after.pipeline.conditioner.encoders}
        for name, folder in origin.tokenizers.items():
            prepare_tokenizer(folder, out / name, origin.components[parts[name]].config.get("vocab_size"))
        (out / "scheduler").mkdir()
        text = json.dumps(origin.scheduler_config, indent=2, sort_keys=True) + "\n"
        (out / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
        written = [*origin.tokenizers, "scheduler"]
        if SAFETY_CHECKER in step.after.components:
            link_or_copy(source.path / PREPROCESSOR_FILE, out / PREPROCESSOR_FILE)
            written.append(Path(PREPROCESSOR_FILE).parent.name)
        return {n: r for folder in written for n, r in records_below(out / folder, out).items()}


def _opened(step: Step, source: Bundle) -> PipelineSource:
    """The model that the origin was made from."""
    from exporters.families.open_source import open_source

    return open_source(source.path, step.after.spec.get("variant", ""))
