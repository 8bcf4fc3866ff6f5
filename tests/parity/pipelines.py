"""A tiny random pipeline as a source bundle, and candidates made from it by one deliberate change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.families import family_of
from exporters.families.open_source import open_source
from exporters.source.model_folder import link_component
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.details import SourceDetails
from runtimes.bundle.folder import Bundle, link_or_copy, records_below, write_manifest
from runtimes.bundle.manifest import SCHEMA, Component, Manifest, Source
from runtimes.bundle.tensors import ShapeRange
from runtimes.text.clip_tokenizer import prepare_tokenizer
from tests.exporters.pipelines import edit_json, edit_weights, write_pipeline
from tests.runtimes.roles import with_fact

SHAPES = {"batch": ShapeRange(1, 1, 3), "height": ShapeRange(32, 64, 128), "width": ShapeRange(32, 64, 128)}


def write_model(folder: Path, context: int = 24) -> Path:
    """`write_pipeline` with a real, tiny CLIP tokenizer, 2 VAE levels and Stable Diffusion's noise schedule."""
    write_pipeline(folder, context=context, prediction="v_prediction", vae={
        "block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    })
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_start=0.00085, beta_end=0.012,
              beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
              timestep_spacing="trailing")
    return folder


def source_bundle(model: Path, out: Path, shapes: Mapping[str, ShapeRange] = SHAPES) -> Bundle:
    """What the `load` pass leaves: safetensors files below components/, tokenizer and scheduler beside them."""
    source = open_source(model)
    for name, part in source.components.items():
        link_component(part, out / "components" / name)
    prepare_tokenizer(model / "tokenizer", out / "tokenizer")
    link_or_copy(model / "scheduler" / "scheduler_config.json", out / "scheduler" / "scheduler_config.json")
    components = {}
    for name, spec in family_of(source.pipeline_class).components(source, shapes).items():
        part = source.components[spec.source_component]
        components[name] = Component(
            format="safetensors", file=f"components/{spec.source_component}/model.safetensors", files={},
            inputs=spec.inputs, outputs=spec.outputs, axes=spec.axes, class_name=part.class_name, precision="fp32",
            parameters=part.parameters, parity={},
            details=SourceDetails(library=part.library, source_component=spec.source_component))
    manifest = Manifest(
        schema=SCHEMA, family=source.family, source=Source("tiny", {}), target="onnxruntime", precision="fp32",
        pipeline=family_of(source.pipeline_class).roles(source), components=components, passes=(), files={}, tools={},
        spec={},
        verified=False, parity={})
    return finished(out, manifest)


def finished(folder: Path, manifest: Manifest) -> Bundle:
    """Write the manifest with the records of the files that are there."""
    components = {
        name: replace(c, files=records_below((folder / c.file).parent, folder))
        for name, c in manifest.components.items()
    }
    files = {**records_below(folder / "tokenizer", folder), **records_below(folder / "scheduler", folder)}
    write_manifest(folder, replace(manifest, components=components, files=files))
    return Bundle.open(folder)


def changed(source: Bundle, out: Path, change: Callable[[Path], None] = lambda _: None,
            roles: Mapping[str, Any] | None = None) -> Bundle:
    """A copy of a bundle whose files `change` has edited, with other facts at the given paths of its roles."""
    shutil.copytree(source.path, out)
    change(out)
    pipeline = source.manifest.pipeline
    for path, fact in (roles or {}).items():
        pipeline = with_fact(pipeline, path, fact)
    return finished(out, replace(source.manifest, pipeline=pipeline))


@dataclass(frozen=True, kw_only=True)
class Behaviour(SourceDetails):
    """Of the format "fake": how a `FakeSession` misbehaves."""

    behaviour: str


def misbehaving(source: Bundle, name: str, behaviour: str) -> Bundle:
    """The bundle with one component run by a `FakeSession` (the format is registered by the fixture `fake_format`)."""
    component = source.component(name)
    details = component.details.become(Behaviour, behaviour=behaviour)
    components = {**source.manifest.components, name: replace(component, format="fake", details=details)}
    return Bundle(source.path, replace(source.manifest, components=components))


def double_one_weight(file: Path, key: str) -> None:
    """Double the largest element of one tensor, the smallest corruption a file can have."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        flat = tensors[key].view(-1)
        flat[flat.abs().argmax()] *= 2
        return tensors

    edit_weights(file, change)


class FakeSession(Session):
    """The true component, except for what its manifest's `behaviour` says."""

    def __init__(self, bundle: Bundle, name: str, options: SessionOptions) -> None:
        from deploy.parity.reference.torch_sessions import TorchSession

        component = bundle.component(name)
        super().__init__(name, component)
        loadable = {name: replace(component, format="safetensors")}
        true = Bundle(bundle.path, replace(bundle.manifest, components=loadable))
        self._inner, self._behaviour = TorchSession(true, name), component.details_as(Behaviour).behaviour

    def _run(self, feeds):
        first = next(iter(feeds.values()))
        if self._behaviour == "only batch 1" and len(first) != 1:
            raise RuntimeError(f"got invalid dimensions for input: index 0 got {len(first)}, expected 1")
        outputs = self._inner.run(feeds)
        name, array = next(iter(outputs.items()))
        if self._behaviour == "transposed":
            array = array.swapaxes(2, 3)
        elif self._behaviour == "NaN at high noise" and feeds["timestep"].max() > 900:
            array = array.copy()
            array.flat[0] = np.nan
        elif self._behaviour == "renamed":
            return {"sample_out": array}
        elif self._behaviour == "shifted by one pixel":
            array = np.roll(array, 1, axis=3)
        return {name: array}
