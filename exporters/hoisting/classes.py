"""Sorts the values of a denoiser's graph by when they are known: at every step, once a prompt, a schedule, a request.

Imports onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.hoisting.dependence import RANDOM, Causes, Dependences, find_dependences
from exporters.hoisting.shapes import Shapes, find_shapes
from runtimes.bundle.roles import PER_PROMPT, PER_REQUEST, PER_STEP
from runtimes.bundle.tensors import DTYPES, Axis


class Kind(enum.StrEnum):
    """How often a value is computed."""

    PROMPT = PER_PROMPT
    STEP = PER_STEP
    REQUEST = PER_REQUEST


@dataclass(frozen=True)
class Inputs:
    """The inputs of a denoiser by what they say. All others change with every step.

    Attributes:
        batch: the axis of rows.
        timestep: its name.
        prompt: names of embedded prompts.
        numbers: names of sizes and other numbers of a request.
        adapters: names of adapters' weights, the same in every call of a session.
    """

    batch: str
    timestep: str
    prompt: Causes
    numbers: Causes
    adapters: Causes = frozenset()


@dataclass(frozen=True)
class Classes:
    """What each value of a graph waits for.

    Attributes:
        inputs: of the graph.
        names: of all graph inputs.
        dependences, shapes: of its values.
    """

    inputs: Inputs
    names: Causes
    dependences: Dependences
    shapes: Shapes

    def kind(self, value: ir.Value) -> Kind | None:
        """When a value is known; None for one that each step makes anew, and for one that no contents of inputs decide.

        Sizes that only the sample has make it a request's.
        """
        causes, known = self.dependences.of(value), self.inputs
        decisive = (causes & self.names) - known.adapters
        if self._moves(causes) or not decisive:
            return None
        if self._needs_sample(value):
            return Kind.REQUEST
        return Kind.PROMPT if decisive <= known.prompt else Kind.STEP if decisive == {known.timestep} else Kind.REQUEST

    def leaves(self, node: ir.Node) -> bool:
        """Whether a node could be computed before the first step."""
        return not self._moves(self.dependences.of(node.outputs[0]))

    def kind_to_cross(self, value: ir.Value) -> Kind | None:
        """The kind of a value that a caller can store row by row and feed: rows first, other sizes known to callers."""
        kind, dims, dtype = self.kind(value), self.shapes.dims.get(value), self.shapes.dtype(value)
        if kind is None or not dims or dims[0] != self.inputs.batch or value.is_graph_output():
            return None
        axes = {d for d in dims[1:] if isinstance(d, str)}
        if dtype is None or dtype.name.lower() not in _TYPES or self.inputs.batch in axes:
            return None
        return kind if axes <= self._axes_of_causes(value) and 0 not in dims else None

    def _moves(self, causes: Causes) -> bool:
        known = self.inputs
        still = {known.timestep} | known.prompt | known.numbers | known.adapters
        return RANDOM in causes or bool((causes & self.names) - still)

    def _axes_of_causes(self, value: ir.Value) -> set[str]:
        """Axes of the inputs whose contents decide a value."""
        causes = self.dependences.of(value)
        return {str(d) for source, dims in self.shapes.dims.items() if source.is_graph_input() and source.name in causes
                for d in dims if isinstance(d, str)}

    def _needs_sample(self, value: ir.Value) -> bool:
        """Whether sizes decide a value that only the sample has."""
        axes = self.dependences.of(value) - self.names
        return not axes <= self._axes_of_causes(value) | {self.inputs.batch}


_TYPES = {"float": "float32", "float16": "float16", "int64": "int64", "int32": "int32", "bool": "bool"}


def dtype_of(value: ir.Value, shapes: Shapes) -> str:
    """The dtype of a value that crosses, as a TensorSpec calls it."""
    dtype = shapes.dtype(value)
    name = _TYPES["" if dtype is None else dtype.name.lower()]
    assert name in DTYPES
    return name


def classify(model: ir.Model, inputs: Inputs, axes: Mapping[str, Axis]) -> Classes:
    """Analyse a graph.

    Args:
        model: nodes in topological order; inputs have named dimensions.
        inputs: what its inputs say.
        axes: of the component.
    """
    shapes = find_shapes(model, {name: axis.range.opt for name, axis in axes.items()}, inputs.batch)
    names = frozenset(value.name or "" for value in model.graph.inputs)
    return Classes(inputs, names, find_dependences(model, shapes), shapes)
