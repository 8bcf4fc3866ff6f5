"""Opens the source model as a bundle: its folder, with a manifest made from configs and headers. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import util
from pathlib import Path

from deploy.core.pass_cache import Cache, versions_of
from deploy.core.spec import REFERENCE, BuildSpec
from deploy.model.hub import cached_name
from deploy.model.source_folder import own_folder, source_folder
from exporters.families import ComponentSpec, family_of
from exporters.families.checker_component import with_safety_checker
from exporters.families.open_source import open_source
from exporters.families.shallow_component import shallow_weights, with_step_cache
from exporters.source.model_folder import MODEL_INDEX, ComponentSource, read_json
from exporters.source.model_folder import Source as PipelineSource
from runtimes import schedulers
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle, record_of, records_below, sha256_of
from runtimes.bundle.manifest import SCHEMA, Component, FileRecord, Manifest, Source, to_json
from runtimes.bundle.manifest import from_json as parsed
from runtimes.bundle.roles import ModeFacts, Role, Roles
from runtimes.codec.safety_checker import PREPROCESSOR_FILE, SAFETY_CHECKER
from runtimes.errors import InputError
from runtimes.system.cache_root import cache_home

ORIGIN_FORMAT = "diffusers"
# An autoencoder holds both halves; a parameter is counted for the component that uses it.
VAE_HALVES = {Role.IMAGE_ENCODER: ("encoder.", "quant_conv."),
              Role.IMAGE_DECODER: ("decoder.", "post_quant_conv.", "quantize.")}
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


def open_origin(spec: BuildSpec) -> Bundle:
    """Read a diffusers folder as the bundle from which the first pass starts.

    Raises:
        InputError: not a pipeline folder, an unknown family, unusable weights, or shapes that do not fit it.
    """
    folder = source_folder(spec)
    source = as_loaded(open_source(folder, spec.variant))
    check_schedulers(source)
    family = family_of(source.pipeline_class)
    specs, roles = family.components(source, spec.shapes), family.roles(source)
    denoiser = specs[roles.denoiser.component]
    if spec.step_cache:
        network = source.components[denoiser.source_component]
        specs, roles = with_step_cache(specs, roles, network.config, str(network.folder))
    if spec.safety_checker:
        source = source.with_component(SAFETY_CHECKER)
        specs = with_safety_checker(specs, roles.codec.decoder.component, source)
        roles = replace(roles, safety_checker=SAFETY_CHECKER)
    hashes = {name: record_of(file) for name, file in source.weight_files().items()}
    known = {file: hashes[name] for name, file in source.weight_files().items()}
    components = {name: _component(source.components[s.source_component], s, roles.role(name), folder, known)
                  for name, s in specs.items()}
    files = {}
    for tokenizer in source.tokenizers.values():
        files.update(records_below(tokenizer, folder))
    files.update(records_below(folder / "scheduler", folder))
    if spec.safety_checker:
        files[PREPROCESSOR_FILE] = record_of(folder / PREPROCESSOR_FILE)
    roles, notes = _own_size(roles, denoiser)
    notes = [*source.notes, *notes]
    manifest = Manifest(
        schema=SCHEMA,
        family=family.name,
        source=_named(spec, {name: record.sha256 for name, record in hashes.items()}),
        target=spec.target,
        precision=spec.precision,
        pipeline=roles,
        components=dict(sorted(components.items())),
        passes=(),
        files=files,
        tools={},
        spec=spec.resolved(),
        verified=False,
        measured={"notes": notes} if notes else {},
    )
    return Bundle(folder, manifest)


def _named(spec: BuildSpec, hashes: Mapping[str, str]) -> Source:
    """What the model is called: on the Hub, in the Hub's cache, or by its folder."""
    if spec.model == REFERENCE:
        return Source(REFERENCE, hashes)
    folder = own_folder(spec).resolve()
    name, commit = cached_name(folder)
    return Source(name or folder.name, hashes, commit)


def _own_size(roles: Roles, denoiser: ComponentSpec) -> tuple[Roles, list[str]]:
    """The roles, with a default size that the bundle can make: the model's own, or what --shapes prefer."""
    codec, sizes = roles.codec, {}
    for name in ("height", "width"):
        axis, rows = denoiser.axes[name], getattr(codec, name) // codec.factor
        fits = rows in axis.range and rows % axis.multiple == 0
        sizes[name] = (rows if fits else axis.range.opt) * codec.factor
    if sizes == {"height": codec.height, "width": codec.width}:
        return roles, []
    note = (f"without a size it makes {sizes['height']} x {sizes['width']} pixels: --shapes leave out the model's own "
            f"{codec.height} x {codec.width}")
    return roles.sized(sizes["height"], sizes["width"]), [note]


def as_loaded(source: PipelineSource) -> PipelineSource:
    """The source as diffusers loads it: configs completed and corrected, defaults of each mode.

    `exporters.source.diffusers_pipeline` asks it, which takes seconds to import; the answer is stored.

    Raises:
        InputError: diffusers refuses it.
    """
    read = {"index": read_json(source.path / MODEL_INDEX), "scheduler": source.scheduler_config,
            "networks": {n: [c.library, c.class_name, c.config] for n, c in source.components.items()}}
    key = {"kind": "as diffusers loads", "read": json.dumps(read, sort_keys=True),
           "libraries": versions_of(("diffusers", "transformers")),
           "asked": [sha256_of(file) for file in _askers()]}
    cache = Cache(cache_home())
    if (found := cache.find_fact(key)) is None:
        from exporters.source import diffusers_pipeline

        loaded = diffusers_pipeline.as_loaded(source)
        answer = {"configs": {name: component.config for name, component in loaded.components.items()},
                  "notes": loaded.notes,
                  "options": loaded.options, "scheduler": loaded.scheduler_config, "modes": to_json(loaded.modes)}
        found = {"json": json.dumps(answer)}  # as text: scheduler configs hold infinities, which facts may not
        cache.store_fact(key, found)
    answer = json.loads(found["json"])
    return replace(
        source, options=answer["options"], notes=tuple(answer["notes"]), scheduler_config=answer["scheduler"],
        scheduler_class=answer["scheduler"]["_class_name"],
        components={n: replace(c, config=answer["configs"][n]) for n, c in source.components.items()},
        modes={name: parsed(ModeFacts, facts, name) for name, facts in answer["modes"].items()})


def _askers() -> list[Path]:
    """The code that asks diffusers; found, not imported."""
    found = [util.find_spec(f"exporters.source.{name}") for name in ("diffusers_pipeline", "config_keys")]
    return [Path(str(spec.origin)) for spec in found if spec]


def check_schedulers(source: PipelineSource) -> None:
    """Refuse a sampler that the runtime does not have, or a setting of it.

    Raises:
        InputError: an unknown class or a key that would be read wrongly; says what may stand there.
    """
    for mode in source.modes.values():
        try:
            schedulers.from_config({**source.scheduler_config, **mode.scheduler})
        except InputError as error:
            error.where = str(source.path / "scheduler" / "scheduler_config.json")
            if source.scheduler_class not in schedulers.CLASS_NAMES:
                error.fix = f'name another in {MODEL_INDEX}, for example "scheduler": ["diffusers", "DDIMScheduler"]'
            raise


def _component(source: ComponentSource, spec: ComponentSpec, role: Role, folder: Path,
               known: Mapping[Path, FileRecord]) -> Component:
    names = [source.folder / "config.json", *([source.index] if source.index else []), *source.weights]
    files = {p.relative_to(folder).as_posix(): known.get(p) or record_of(p) for p in names}
    headers = source.headers()
    own = shallow_weights(source.config) if role is Role.SHALLOW else VAE_HALVES.get(role, ("",))
    sizes = {key: (kind, math.prod(shape)) for key, (kind, shape) in headers.items() if key.startswith(own)}
    stored = max(sizes.values(), key=lambda entry: entry[1], default=("F32", 0))[0]
    return Component(
        format=ORIGIN_FORMAT,
        file=(source.index or source.weights[0]).relative_to(folder).as_posix(),
        files=files,
        inputs=spec.inputs,
        outputs=spec.outputs,
        axes=spec.axes,
        class_name=source.class_name,
        precision=PRECISIONS.get(stored, stored.lower()),
        parameters=sum(count for _, count in sizes.values()),
        details=SourceDetails(library=source.library, source_component=spec.source_component, takes=spec.takes,
                              gives=spec.gives),
    )
