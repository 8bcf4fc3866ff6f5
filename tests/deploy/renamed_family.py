"""A family that exists in the tests alone: Stable Diffusion's networks under names that nothing else knows.

Whatever asks for a component, an input or an output by name instead of by its role fails on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from exporters.families import FAMILIES, ComponentSpec, Family
from exporters.families.declaration import Shapes
from exporters.families.stable_diffusion import STABLE_DIFFUSION
from exporters.source.model_folder import Source
from runtimes.bundle.roles import Coder, Roles

READER, BACKBONE, PACKER, PAINTER = "reader", "backbone", "packer", "painter"
NAMES = {"text_encoder": READER, "unet": BACKBONE, "vae_encoder": PACKER, "vae_decoder": PAINTER}
INPUTS = {"text_encoder": ("words",), "unet": ("x", "t", "c"), "vae_encoder": ("pixels",), "vae_decoder": ("z",)}
OUTPUTS = {"text_encoder": ("states",), "unet": ("eps",), "vae_encoder": ("statistics",), "vae_decoder": ("rgb",)}


def _components(source: Source, shapes: Shapes) -> dict[str, ComponentSpec]:
    return {NAMES[name]: _renamed(name, spec) for name, spec in STABLE_DIFFUSION.components(source, shapes).items()}


def _renamed(name: str, spec: ComponentSpec) -> ComponentSpec:
    inputs, outputs = (tuple(replace(old, name=new) for old, new in zip(specs, names[name], strict=True))
                       for specs, names in ((spec.inputs, INPUTS), (spec.outputs, OUTPUTS)))
    return replace(spec, name=NAMES[name], inputs=inputs, outputs=outputs,
                   takes=tuple(old.name for old in spec.inputs), gives=tuple(old.name for old in spec.outputs))


def _roles(source: Source) -> Roles:
    own = STABLE_DIFFUSION.roles(source)
    (reader,) = own.conditioner.encoders
    return replace(
        own, denoiser=replace(own.denoiser, component=BACKBONE, sample="x", timestep="t", output="eps"),
        codec=replace(own.codec, encoder=Coder(PACKER, "pixels", "statistics"), decoder=Coder(PAINTER, "z", "rgb")),
        conditioner=replace(own.conditioner, context="c",
                            encoders=(replace(reader, component=READER, ids="words", hidden="states"),)))


RENAMED = Family("renamed", STABLE_DIFFUSION.source_components, STABLE_DIFFUSION.tokenizers, _components, _roles)


@contextmanager
def registered() -> Iterator[None]:
    """Models of diffusers' plain Stable Diffusion class are of the renamed family."""
    before = FAMILIES["StableDiffusionPipeline"]
    FAMILIES["StableDiffusionPipeline"] = RENAMED
    try:
        yield
    finally:
        FAMILIES["StableDiffusionPipeline"] = before
