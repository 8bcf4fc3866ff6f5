"""Takes a denoiser's graph apart at values that were chosen: what runs beforehand, and what is left for every step.

Imports onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from exporters.hoisting.classes import Classes, Kind, dtype_of
from exporters.hoisting.dependence import graphs_of
from exporters.onnx.graph_edits import new_node, small_constant
from runtimes.bundle.tensors import TensorSpec

SEPARATOR = "+"  # between a joined input and the first of its parts


@dataclass(frozen=True)
class Joined:
    """One input of the step graph: a value, or several of a kind that differ in their second size alone, side by side.

    Attributes:
        name: of the input, and of the output of the entry that gives it.
        kind: what it is computed for.
        parts: the values, by the names of their nodes.
        sizes: of the parts along the second axis, if there are several.
        dtype, shape: of the whole, as a TensorSpec says it.
    """

    name: str
    kind: Kind
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def spec(self) -> TensorSpec:
        """As an input of the step graph."""
        return TensorSpec(self.name, self.dtype, self.shape, f"computed {self.kind}")


def label(value: ir.Value) -> str:
    """A value by the node that makes it, `MODULE/MatMul`: the same in every graph of the network."""
    node = value.producer()
    assert node is not None
    name = node.name or value.name or ""
    return name if len(node.outputs) == 1 else f"{name}:{value.index()}"


def join(crossing: Mapping[ir.Value, Kind], classes: Classes) -> tuple[Joined, ...]:
    """Lay out the values as inputs: small ones of one kind side by side, so that a call is fed a few arrays.

    Those of a prompt stay apart: splitting a copy of them at every step would cost what was saved.
    """
    groups: dict[tuple[object, ...], list[ir.Value]] = {}
    for value, kind in crossing.items():
        shape, dtype = classes.shapes.dims[value], dtype_of(value, classes.shapes)
        joins = kind is not Kind.PROMPT and len(shape) > 1 and isinstance(shape[1], int)
        key = (kind, dtype, (shape[0], *shape[2:])) if joins else (kind, label(value))
        groups.setdefault(key, []).append(value)
    found = []
    for values in groups.values():
        shape = classes.shapes.dims[values[0]]
        sizes = tuple(int(classes.shapes.dims[v][1]) for v in values) if len(values) > 1 else ()
        whole = (shape[0], sum(sizes), *shape[2:]) if sizes else shape
        name = label(values[0]) + (f"{SEPARATOR}{len(values) - 1}" if sizes else "")
        found.append(Joined(name, crossing[values[0]], tuple(map(label, values)), sizes,
                            dtype_of(values[0], classes.shapes), whole))
    return tuple(found)


def leave_steps(model: ir.Model, inputs: Sequence[Joined], values: Mapping[str, ir.Value]) -> None:
    """Make a graph the step graph, in place: it takes the values, and what only they needed is gone.

    Args:
        model: the whole graph, or another of the same network that has some of the values.
        inputs: that it gets, as far as it has one of their parts. Graph inputs that nothing reads any more go.
        values: of the graph, by label.
    """
    read = _read_inputs(model)
    for joined in inputs:
        like = next((values[name].producer() for name in joined.parts if name in values), None)
        if like is None:
            continue
        given = ir.Value(name=joined.name, shape=ir.Shape(joined.shape),
                         type=ir.TensorType(ir.DataType[_ONNX[joined.dtype]]))
        model.graph.inputs.append(given)
        parts: Iterable[ir.Value] = [given]
        if joined.sizes:
            lengths = small_constant(model, np.array(joined.sizes, np.int64), f"{joined.name}.sizes")
            split = new_node("Split", [given, lengths], like, {"axis": 1}, outputs=len(joined.sizes))
            split.name = f"{joined.name}/Split"
            model.graph.insert_before(model.graph[0], split)
            parts = split.outputs
        for name, part in zip(joined.parts, parts, strict=True):
            if name in values:
                ir.convenience.replace_all_uses_with(values[name], part)
    _drop_unused(model, read)


def leave_entry(model: ir.Model, outputs: Sequence[Joined], batch: str, rows: str) -> None:
    """Make a graph one of the entries that run beforehand, in place: it gives the values and takes what they need.

    Args:
        model: the whole graph.
        outputs: what it gives.
        batch: the axis of rows in the whole graph.
        rows: what that axis is called in the entry.
    """
    values, read = {label(value): value for node in model.graph for value in node.outputs}, _read_inputs(model)
    given: list[ir.Value] = []
    for joined in outputs:
        value = values[joined.parts[0]]
        like = value.producer()
        assert like is not None
        if joined.sizes:
            node = new_node("Concat", [values[name] for name in joined.parts], like, {"axis": 1})
        else:
            node = new_node("Identity", [value], like)  # of its own name, whatever else reads the value
        node.name = f"{joined.name}/{node.op_type}"
        if value.name == joined.name:
            value.name = f"{joined.name}/inside"
        model.graph.append(node)
        node.outputs[0].name = joined.name
        node.outputs[0].shape = ir.Shape([rows if d == batch else d for d in joined.shape])
        node.outputs[0].type = ir.TensorType(ir.DataType[_ONNX[joined.dtype]])
        given.append(node.outputs[0])
    model.graph.outputs.clear()
    model.graph.outputs.extend(given)
    _drop_unused(model, set())
    _measure_elsewhere(model)
    _drop_unused(model, read)
    for source in model.graph.inputs:
        if source.shape is not None:
            source.shape = ir.Shape([rows if not isinstance(d, int) and d.value == batch else d for d in source.shape])


_ONNX = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def _read_inputs(model: ir.Model) -> set[ir.Value]:
    return {value for value in model.graph.inputs if list(value.uses())}


def _drop_unused(model: ir.Model, read: set[ir.Value]) -> None:
    """Drop nodes and weights that nothing needs, and of the inputs that were read those that no longer are."""
    ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(model)
    inner = {value for node in model.graph for graph in graphs_of(node) for value in _read_inside(graph)}
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and value not in inner and not value.is_graph_output():
            del model.graph.initializers[name]
    for value in [v for v in model.graph.inputs if v in read and not list(v.uses()) and v not in inner]:
        model.graph.inputs.remove(value)


def _read_inside(graph: ir.Graph) -> set[ir.Value]:
    return {v for node in graph for v in node.inputs if v is not None} | {
        v for node in graph for inner in graphs_of(node) for v in _read_inside(inner)} | set(graph.outputs)


def _measure_elsewhere(model: ir.Model) -> None:
    """Take a size that several inputs share from one whose contents are read, so that no other is an input for it."""
    contents = [v for v in model.graph.inputs if any(use.node.op_type != "Shape" for use in v.uses())]
    for value in [v for v in model.graph.inputs if v not in contents]:
        for node in [use.node for use in value.uses()]:
            bounds = [node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end")]
            axes = [_axis(d) for d in list(value.shape or ())[slice(*bounds)]]
            others = [(other, [_axis(d) for d in other.shape or ()]) for other in contents]
            found = next(((other, dims.index(axes[0])) for other, dims in others if len(axes) == 1 and axes[0] in dims),
                         None)
            if found is not None:
                other, start = found
                node.replace_input_with(0, other)
                node.attributes["start"] = ir.AttrInt64("start", start)
                node.attributes["end"] = ir.AttrInt64("end", start + 1)


def _axis(dim: int | ir.SymbolicDim) -> str:
    return "" if isinstance(dim, int) else str(dim.value)
