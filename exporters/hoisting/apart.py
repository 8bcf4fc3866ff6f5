"""Hoists what does not depend on the sample out of a denoiser's graph: what leaves, and the graphs that result.

Imports onnx and onnx_ir; import it inside the function that needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from exporters.hoisting.classes import Classes, Inputs, Kind, classify
from exporters.hoisting.cut import FREE, Speeds, choose_cut
from exporters.hoisting.dependence import graphs_of, inputs_of
from exporters.hoisting.split import Joined, join, label, leave_entry, leave_steps
from exporters.onnx.stored_weights import unmap
from exporters.onnx.trace import save_model
from runtimes.bundle.tensors import Axis

Load = Callable[[], ir.Model]


@dataclass(frozen=True)
class Content:
    """What a graph holds: operators, floating-point weights, and bytes of them."""

    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Hoisting:
    """How a denoiser is taken apart.

    Attributes:
        values: that cross, as inputs of the step graph; none if nothing is worth it.
        takes: for each kind of entry the inputs of the whole graph that it takes, in their order.
        remain: all inputs of the step graph, in their order.
    """

    values: tuple[Joined, ...]
    takes: Mapping[Kind, tuple[str, ...]]
    remain: tuple[str, ...]

    def of(self, kind: Kind) -> tuple[Joined, ...]:
        """The values of one kind."""
        return tuple(value for value in self.values if value.kind is kind)


def analyse(load: Load, inputs: Inputs, axes: Mapping[str, Axis], speeds: Speeds) -> Hoisting:
    """Decide what leaves a denoiser's graph. Reads no weights.

    Args:
        load: gives the graph as exported, a new copy at each call.
        inputs: what its inputs say.
        axes: of the component.
        speeds: of the target.
    """
    model = load()
    classes = classify(model, inputs, axes)
    values = join(_past_views(choose_cut(model, classes, speeds), classes), classes)
    batch, left = inputs.batch, Hoisting(values, {}, ())
    takes = {kind: _inputs_after(load, partial(leave_entry, outputs=left.of(kind), batch=batch, rows=batch))
             for kind in Kind if left.of(kind)}
    remain = _inputs_after(load, lambda graph: leave_steps(graph, values, labelled(graph)))
    return Hoisting(values, takes, remain)


def inputs_of_other(whole: ir.Model, part: ir.Model, values: Sequence[Joined]) -> tuple[str, ...]:
    """All inputs of another graph of the same network, once it takes the values that it has; see `write_steps`."""
    leave_steps(part, values, same_values(whole, part, values))
    return tuple(value.name or "" for value in part.graph.inputs)


def write_steps(source: Path, out: Path, values: Sequence[Joined], whole: Path | None = None) -> Content:
    """Write the graph that is left for every step.

    Args:
        source: ONNX file of the denoiser, or of its shallow entry.
        out: ONNX file to write.
        values: that it takes; a shallow entry takes those that it has.
        whole: of the denoiser, in which the values of a shallow entry have their names.
    """
    model = ir.load(source)
    unmap(model)
    leave_steps(model, values, labelled(model) if whole is None else same_values(ir.load(whole), model, values))
    save_model(model, out)
    return content_of(model)


def write_entry(source: Path, out: Path, values: Sequence[Joined], batch: str, rows: str) -> Content:
    """Write a graph that runs beforehand.

    Args:
        source: ONNX file of the denoiser.
        out: ONNX file to write.
        values: that it gives.
        batch, rows: what the axis of rows is called in the denoiser, and in what is written.
    """
    model = ir.load(source)
    unmap(model)
    leave_entry(model, values, batch, rows)
    save_model(model, out)
    return content_of(model)


def content_of(model: ir.Model) -> Content:
    """What a graph holds, without reading weights."""
    weights = [v.const_value for v in model.graph.initializers.values()
               if v.const_value is not None and v.const_value.dtype.is_floating_point()]
    return Content(len(model.graph), sum(w.size for w in weights), sum(w.nbytes for w in weights))


def content_at(file: Path) -> Content:
    """What the graph of a file holds, without reading weights."""
    return content_of(ir.load(file))


def labelled(model: ir.Model) -> dict[str, ir.Value]:
    """The values of a graph by their labels."""
    return {label(value): value for node in model.graph for value in node.outputs}


def same_values(whole: ir.Model, part: ir.Model, values: Sequence[Joined]) -> dict[str, ir.Value]:
    """Values of a second graph of the same network that are computed as those of the first, by the latter's labels.

    They are computed alike if the same operators read equal weights and the same inputs, all the way down; what nodes
    and weights are called may differ.
    """
    names = labelled(whole)
    wanted = {name: names[name] for joined in values for name in joined.parts}
    inputs = needed_by(wanted.values())
    found = fingerprints(whole, inputs)
    known = {text: value for value, text in fingerprints(part, inputs).items()}
    return {name: known[found[value]] for name, value in wanted.items() if found.get(value) in known}


def needed_by(values: Iterable[ir.Value]) -> set[str]:
    """Names of the graph inputs that values follow from."""
    seen, left, names = set[ir.Value](), list(values), set[str]()
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            names.add(value.name or "")
        elif (node := value.producer()) is not None:
            left.extend(inputs_of(node))
    return names


def fingerprints(model: ir.Model, inputs: Set[str]) -> dict[ir.Value, str]:
    """For each value that follows from some inputs alone, a hash of how it is computed; weights count by contents.

    Nodes that hold graphs have none.
    """
    found = {value: _hashed("input", value.name) for value in model.graph.inputs if value.name in inputs}
    for node in model.graph:
        read = [v for v in node.inputs if v is not None]
        if any(True for _ in graphs_of(node)) or any(v not in found and not v.is_initializer() for v in read):
            continue
        for value in read:
            if value not in found and value.const_value is not None:
                tensor = value.const_value
                found[value] = _hashed(str(tensor.dtype), str(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
        made = _hashed(node.domain, node.op_type, attributes, [found.get(v, "") if v is not None else ""
                                                               for v in node.inputs])
        found |= {value: _hashed(made, value.index()) for value in node.outputs}
    return found


def _hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _past_views(crossing: Mapping[ir.Value, Kind], classes: Classes) -> dict[ir.Value, Kind]:
    """Let the values of a timestep cross behind what only renames their elements; a prompt's meet attention first."""
    moved: dict[ir.Value, Kind] = {}
    for start, kind in crossing.items():
        value = start
        while kind is not Kind.PROMPT and (further := _only_view(value)) is not None and (
                classes.kind_to_cross(further) is kind):
            value = further
        moved[value] = kind
    return moved


def _only_view(value: ir.Value) -> ir.Value | None:
    """The value under another shape, if nothing else reads it and constants say which."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0:
        return None
    node = uses[0].node
    fixed = all(v is None or v.is_initializer() for v in node.inputs[1:])
    return node.outputs[0] if node.domain == "" and node.op_type in FREE and fixed else None


def _inputs_after(load: Load, change: Callable[[ir.Model], None]) -> tuple[str, ...]:
    model = load()
    change(model)
    return tuple(value.name or "" for value in model.graph.inputs)
