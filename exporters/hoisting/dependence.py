"""Finds what each value of a graph depends on: which inputs' contents, and which of their axes. Data alone decides.

Imports onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporters.hoisting.shapes import Shapes

RANDOM = "random numbers"
Causes = frozenset[str]
NOTHING: Causes = frozenset()
# Operators of ONNX whose result is another each time that they run.
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
# Operators of ONNX whose floating-point inputs decide the shape of what they give. In all others only integers do.
_SHAPED_BY_FLOATS = {"Compress", "NonMaxSuppression", "NonZero", "OneHot", "Range", "Resize", "Unique", "Upsample"}


@dataclass(frozen=True)
class Dependences:
    """What the values of a graph depend on.

    Attributes:
        contents: value -> names of the graph inputs and of the axes that its elements follow from, or `RANDOM`.
        shapes: value -> the same for its shape alone: mostly axes.
    """

    contents: Mapping[ir.Value, Causes]
    shapes: Mapping[ir.Value, Causes]

    def of(self, value: ir.Value) -> Causes:
        """What decides the elements of a value; nothing, of a weight or another constant."""
        return self.contents.get(value, NOTHING)


def find_dependences(model: ir.Model, shapes: Shapes) -> Dependences:
    """Follow the data through a graph.

    An input's contents depend on the input and on its axes, its shape on its axes alone. So what is computed from
    `Shape` of a sample depends on "height" and "width" and not on the sample. A node with graphs of its own (If, Loop,
    Scan) is taken as a whole, with all that those graphs read.

    Args:
        model: nodes in topological order.
        shapes: of its values; an unknown type may be one of integers.
    """
    contents: dict[ir.Value, Causes] = {}
    sizes: dict[ir.Value, Causes] = {}
    for value in model.graph.inputs:
        axes = frozenset(str(d.value) for d in value.shape or () if isinstance(d, ir.SymbolicDim))
        sizes[value] = axes
        contents[value] = axes | {value.name or ""}
    for node in model.graph:
        inputs = list(inputs_of(node))
        shape = frozenset().union(*(sizes.get(v, NOTHING) for v in inputs), *(
            contents.get(v, NOTHING) for v in inputs if _decides_shape(node, v, shapes)))
        if node.domain == "" and node.op_type in ("Shape", "Size"):
            causes = _measured_axes(node, sizes)
        else:
            causes = frozenset().union(shape, *(contents.get(v, NOTHING) for v in inputs))
        if _is_random(node):
            causes |= {RANDOM}
        for value in node.outputs:
            contents[value], sizes[value] = causes, NOTHING if node.op_type == "Shape" else shape
    return Dependences(contents, sizes)


def inputs_of(node: ir.Node) -> Iterator[ir.Value]:
    """All that a node reads, and what graphs inside it read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for graph in graphs_of(node):
        own = {value for inner in graph for value in inner.outputs} | {*graph.inputs, *graph.initializers.values()}
        read = [*(v for inner in graph for v in inputs_of(inner)), *graph.outputs]
        yield from (value for value in dict.fromkeys(read) if value not in own)


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds: branches of an If, bodies of a Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _decides_shape(node: ir.Node, value: ir.Value, shapes: Shapes) -> bool:
    """Whether the contents of an input may decide the shape of the result; unknown operators and types may."""
    if node.domain != "" or node.op_type in _SHAPED_BY_FLOATS or any(True for _ in graphs_of(node)):
        return True
    dtype = shapes.dtype(value)
    return dtype is None or not dtype.is_floating_point()


def _measured_axes(node: ir.Node, sizes: Mapping[ir.Value, Causes]) -> Causes:
    """The axes that a Shape or Size reads: of a graph input, only those within its start and end."""
    value = node.inputs[0]
    if value is None:
        return NOTHING
    if not value.is_graph_input() or value.shape is None or node.op_type == "Size":
        return sizes.get(value, NOTHING)
    bounds = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
    return frozenset(str(d.value) for d in list(value.shape)[slice(*bounds)] if isinstance(d, ir.SymbolicDim))


def _is_random(node: ir.Node) -> bool:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return True
    return node.op_type in _RANDOM or any(_is_random(inner) for graph in graphs_of(node) for inner in graph)
