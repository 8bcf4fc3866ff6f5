"""The types in which a family declares its pipelines: components, inputs and outputs, ranges of axes. No weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporters.source.model_folder import Source
from runtimes.bundle.roles import Roles
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError

SHAPE_NAMES = ("batch", "height", "width", "sequence")
Shapes = Mapping[str, ShapeRange]


@dataclass(frozen=True)
class ComponentSpec:
    """One network to export: where its weights are and what flows through it.

    Attributes:
        name: name in the bundle ("vae_decoder"); also selects the wrapper in `exporters.source.networks`.
        source_component: name in model_index.json ("vae").
        inputs, outputs: in the order of the wrapper's arguments and results; named dimensions are keys of `axes`.
        axes: every named dimension of inputs and outputs.
        takes, gives: what the network calls inputs and outputs, in order, where the component calls them otherwise.
    """

    name: str
    source_component: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    @property
    def any_size(self) -> bool:
        """Whether latent rows and columns need not be halved evenly: the U-Net gets the size to double to."""
        return {"height", "width"} <= set(self.axes) and all(self.axes[n].multiple == 1 for n in ("height", "width"))

    def example_sizes(self) -> dict[str, int]:
        """Sizes of all axes at which the network is traced: small, distinct, within the ranges where they allow it."""
        wanted = {"batch": 2, "sequence": 7}
        if self.any_size:  # halved three times they are 3 and 4 still: a size of 1 would be taken for a constant
            wanted |= {"height": 17, "width": 27}
        sizes = {}
        for name, axis in self.axes.items():
            factor = wanted.get(name, (3 if name.endswith("width") else 2) * axis.multiple)
            sizes[name] = min(max(factor, 2), axis.range.max) if name == "sequence" else factor
        return sizes


@dataclass(frozen=True)
class Family:
    """Pipelines of one kind.

    Attributes:
        name: name in the manifest.
        source_components: entries of model_index.json whose weights are needed; others are left out.
        tokenizers: entries of model_index.json that hold tokenizer files.
        optional: networks and tokenizers that a pipeline of this kind may lack, with null in model_index.json.
        components: what to export from a source; raises InputError for a config that the pipeline cannot feed.
        roles: what each component is for, and what the sampling loop must know.
    """

    name: str
    source_components: tuple[str, ...]
    tokenizers: tuple[str, ...]
    components: Callable[[Source, Shapes], dict[str, ComponentSpec]]
    roles: Callable[[Source], Roles]
    optional: tuple[str, ...] = ()


def check_shapes(shapes: Shapes) -> None:
    """Refuse ranges of axes that no component has.

    Raises:
        InputError: an unknown name; lists the known ones.
    """
    if unknown := sorted(set(shapes) - set(SHAPE_NAMES)):
        raise InputError(
            f"unknown axis {', '.join(unknown)}", where="--shapes", fix=f"known axes: {', '.join(SHAPE_NAMES)}"
        )


def pixels_to_latents(shapes: Shapes, name: str, unit: int, factor: int, default: ShapeRange) -> ShapeRange:
    """The range of latent rows or columns for a range that the user gave in pixels.

    Args:
        name: "height" or "width".
        unit: pixels must be divisible by this.
        factor: pixels per latent row.
        default: latent rows when the user says nothing.

    Raises:
        InputError: a size that is not divisible by `unit`.
    """
    if name not in shapes:
        return default
    wanted = shapes[name]
    for size in (wanted.min, wanted.opt, wanted.max):
        if size % unit:
            near = max(unit, round(size / unit) * unit)
            raise InputError(
                f"{name}={size} pixels is not a multiple of {unit}", where="--shapes", fix=f"for example {near}"
            )
    return ShapeRange(wanted.min // factor, wanted.opt // factor, wanted.max // factor)


def scaled(range_: ShapeRange, factor: int) -> ShapeRange:
    """A range with every size multiplied."""
    return ShapeRange(range_.min * factor, range_.opt * factor, range_.max * factor)


def config_value(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A required entry of a config.json.

    Raises:
        InputError: missing or of another type.
    """
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(
            f"{key} is {value!r:.40}, which cannot be used", where=where, fix="save the pipeline again with diffusers"
        )
    return value
