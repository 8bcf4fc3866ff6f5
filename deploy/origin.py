"""The source model seen as a bundle: its folder, with a manifest made from configs and headers. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from deploy.sources import source_folder
from deploy.spec import REFERENCE, BuildSpec
from exporters.families import ComponentSpec
from exporters.families.safety_checker import with_safety_checker
from exporters.families.step_cache import shallow_weights, with_step_cache
from exporters.source import ComponentSource, open_source
from runtimes.bundle import Bundle, record_of, records_below
from runtimes.guidance import SHALLOW
from runtimes.manifest import SCHEMA, Component, FileRecord, Manifest, Source
from runtimes.safety import PREPROCESSOR_FILE, SAFETY_CHECKER

ORIGIN_FORMAT = "diffusers"
# An autoencoder holds both halves; a parameter is counted for the component that uses it.
VAE_HALVES = {"vae_encoder": ("encoder.", "quant_conv."), "vae_decoder": ("decoder.", "post_quant_conv.", "quantize.")}
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


def open_origin(spec: BuildSpec) -> Bundle:
    """Read a diffusers folder as the bundle from which the first pass starts.

    Raises:
        InputError: not a pipeline folder, an unknown family, unusable weights, or shapes that do not fit it.
    """
    folder = source_folder(spec)
    source = open_source(folder)
    specs = source.family.components(source, spec.shapes)
    if spec.step_cache:
        unet = source.components["unet"]
        specs = with_step_cache(specs, unet.config, str(unet.folder))
    if spec.safety_checker:
        source = source.with_component(SAFETY_CHECKER)
        specs = with_safety_checker(specs, source)
    hashes = {name: record_of(file) for name, file in source.weight_files().items()}
    known = {file: hashes[name] for name, file in source.weight_files().items()}
    components = {name: _component(source.components[s.source_component], s, folder, known)
                  for name, s in specs.items()}
    files = {}
    for tokenizer in source.tokenizers.values():
        files.update(records_below(tokenizer, folder))
    files.update(records_below(folder / "scheduler", folder))
    if spec.safety_checker:
        files[PREPROCESSOR_FILE] = record_of(folder / PREPROCESSOR_FILE)
    manifest = Manifest(
        schema=SCHEMA,
        family=source.family.name,
        source=Source(REFERENCE if spec.model == REFERENCE else Path(spec.model).resolve().name,
                      {name: record.sha256 for name, record in hashes.items()}),
        target=spec.target,
        precision=spec.precision,
        pipeline=source.family.facts(source),
        components=dict(sorted(components.items())),
        passes=(),
        files=files,
        tools={},
        spec=spec.resolved(),
        verified=False,
    )
    return Bundle(folder, manifest)


def _component(source: ComponentSource, spec: ComponentSpec, folder: Path,
               known: Mapping[Path, FileRecord]) -> Component:
    names = [source.folder / "config.json", *([source.index] if source.index else []), *source.weights]
    files = {p.relative_to(folder).as_posix(): known.get(p) or record_of(p) for p in names}
    headers = source.headers()
    own = shallow_weights(source.config) if spec.name == SHALLOW else VAE_HALVES.get(spec.name, ("",))
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
        details={"library": source.library, "source_component": spec.source_component},
    )
