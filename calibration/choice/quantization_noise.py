"""Predicts the error that each layer's integers would add to the output, from the float32 graph and few recorded calls.

Measuring a layer alone needs a graph and a run for each; a large U-Net has hundreds. Here one graph computes every
layer once more from rounded inputs and weights and gives the energy of the difference. How much of it arrives at the
output follows from a walk back through the graph, in which rounding errors are white noise that is independent of the
signal, as is usual for fixed-point filters (Jackson, "On the interaction of roundoff noise and dynamic range in digital
filters", BSTJ 49, 1970).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from calibration.graphs.layers import STATIC, WEIGHT, Layer, find_layers
from calibration.graphs.qdq_placement import Writer
from calibration.integers.external_data import array_of
from calibration.integers.int8 import Integers
from calibration.integers.ranges import Range, Scheme
from calibration.trajectory.inner_tensors import Calls, beside, plain_session

BELOW = {STATIC: (STATIC, WEIGHT), WEIGHT: (WEIGHT,)}
PARAMETERS_AT_ONCE = 1 << 29  # whose integers one graph holds beside the float32 weights
# Where an error of the input hardly reaches the output: sizes, and factors that saturate (the gate of SiLU and GELU).
DEAF = ("Shape", "Size", "Sigmoid", "Erf", "Tanh")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerNoise:
    """What one layer costs.

    Attributes:
        errors: precision -> predicted relative L2 of the graph's outputs with this layer in it and all others in
            float32, root mean square over the calls. Right in order; mostly two to four times too small in size.
        macs: multiply-accumulates of the first call.
    """

    errors: Mapping[str, float]
    macs: int


def predict_noise(graph: Path, assignment: Mapping[str, str], ranges: Mapping[str, Range], scheme: Scheme,
                  calls: Calls, *, threads: int = 0, stored: Integers | None = None) -> dict[str, LayerNoise]:
    """Every layer's cost by node name. Takes about three times the seconds of the float32 graph for each call.

    Args:
        graph: float32.
        assignment: precision of every layer; the cost of this one and of storage in 8 bits alone are predicted.
        ranges: of `tensors_to_observe`.
        scheme: integers of the target.
        calls: recorded inputs, few.
        stored: where the weights' integers are, or will be for those who try assignments next.
    """
    if stored is None:
        with tempfile.TemporaryDirectory(prefix="ldm-noise-") as scratch:
            return predict_noise(graph, assignment, ranges, scheme, calls, threads=threads,
                                 stored=Integers(Path(scratch)))
    model = ir.load(graph)
    layers = find_layers(model)
    lower = {node: BELOW.get(precision, ()) for node, precision in assignment.items()}
    found = _run(graph, [], _mixed(model, layers), {}, ranges, stored, scheme, calls, threads)
    for part in _parts([layer for layer in layers if lower[layer.node]]):
        found |= _run(graph, part, [], lower, ranges, stored, scheme, calls, threads)
    reached = _sensitivity(model, layers, found)
    result = {}
    for layer in layers:
        arrives = np.asarray(reached.get(layer.result, 0.0)) / _energy(found, layer.result)
        sizes = {p: float(np.sqrt(np.mean(found[_noise(layer, p)] * arrives))) for p in lower[layer.node]}
        channels = _weight(model, layer).shape[layer.axis]
        result[layer.node] = LayerNoise(sizes, int(found[_size_name(layer.result)][0]) * layer.parameters // channels)
    return result


def _parts(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    part: list[Layer] = []
    for layer in layers:
        if part and sum(other.parameters for other in part) + layer.parameters > PARAMETERS_AT_ONCE:
            yield part
            part = []
        part.append(layer)
    if part:
        yield part


def _mixed(model: ir.Model, layers: Sequence[Layer]) -> list[str]:
    """Tensors whose energies the walk back needs: around layers, and around nodes where signals meet."""
    names = [name for layer in layers for name in (layer.source, layer.result)]
    floats = set(names)  # an optimized graph does not type every tensor; a layer's are known
    for node in model.graph:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        # All tensors of such a node are of one type; those of integers put shapes together.
        if node.op_type in ("Add", "Sub", "Sum", "Concat") and any(
                v.dtype == ir.DataType.FLOAT or v.name in floats for v in values):
            met = [v.name or "" for v in values if not v.is_initializer()]
            names += met
            floats.update(met)
    return list(dict.fromkeys(names))


def _run(graph: Path, layers: Sequence[Layer], tensors: Sequence[str], precisions: Mapping[str, Sequence[str]],
         ranges: Mapping[str, Range], stored: Integers, scheme: Scheme, calls: Calls, threads: int) -> dict[str, Array]:
    """Scalars by name, each (calls,): energies and sizes of tensors, and of each layer's error in each precision."""
    model = ir.load(graph)
    nodes = {node.name: node for node in model.graph}
    values = {v.name: v for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    scalars = [_reduce(model, values[name], op, of(name)) for name in tensors
               for op, of in (("ReduceSumSquare", _energy_name), ("Size", _size_name))]
    shadows = {f"{layer.result}/{STATIC}": ranges[layer.result] for layer in layers if layer.result in ranges}
    writer = Writer(model, {**ranges, **shadows}, scheme, stored)
    for layer in layers:
        node = nodes[layer.node]
        for precision in precisions[layer.node]:
            attributes = {key: a.value for key, a in node.attributes.items()}
            shadow = _add(model, node, node.op_type, list(node.inputs), f"{layer.result}/{precision}", attributes)
            difference = _add(model, shadow, "Sub", [shadow.outputs[0], node.outputs[0]],
                              f"{layer.result}/{precision}/error")
            scalars.append(_reduce(model, difference.outputs[0], "ReduceSumSquare", _noise(layer, precision)))
            writer.place(shadow, layer, precision)
    common.TopologicalSortPass()(model)
    session = plain_session(beside(model, graph, stored.folder), threads)
    rows = [session.run(scalars, dict(feeds)) for feeds in calls()]
    return {name: np.array([float(row[i]) for row in rows]) for i, name in enumerate(scalars)}


def _sensitivity(model: ir.Model, layers: Sequence[Layer], found: Mapping[str, Array]) -> dict[str, Array]:
    """Tensor -> (calls,) how much of its relative squared error arrives at the outputs.

    A sum's parts count by their share of its energy. A product with constant weights lets noise through by the energy
    of its weights, the signal by what was measured; noise is not aligned with the weights and mostly loses. All else
    keeps the relative error.
    """
    by_node = {layer.node: layer for layer in layers}
    reached: dict[str, Any] = {v.name or "": 1.0 for v in model.graph.outputs}
    for node in reversed(list(model.graph)):
        arrived = sum(reached.get(v.name or "", 0.0) for v in node.outputs)
        if node.op_type in DEAF or not np.any(arrived):
            continue
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            name = value.name or ""
            if node.name in by_node and name == by_node[node.name].source:
                share = _white_gain(model, by_node[node.name], found)
            elif node.op_type in ("Add", "Sub", "Sum", "Concat") and _energy_name(name) in found:
                share = _share(found, name, node)
            else:
                share = np.ones(1)
            reached[name] = reached.get(name, 0.0) + arrived * share
    return reached


def _white_gain(model: ir.Model, layer: Layer, found: Mapping[str, Array]) -> Array:
    weight = _weight(model, layer)
    energy = float(np.vdot(weight, weight)) / weight.shape[layer.axis]
    gain: Array = energy * _mean_square(found, layer.source) / _mean_square(found, layer.result)
    return gain


def _weight(model: ir.Model, layer: Layer) -> NDArray[Any]:
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    return array_of(tensor)


def _share(found: Mapping[str, Array], name: str, node: ir.Node) -> Array:
    of = _energy if node.op_type == "Concat" else _mean_square  # what is added may be broadcast
    share: Array = of(found, name) / of(found, node.outputs[0].name or "")
    return share


def _mean_square(found: Mapping[str, Array], name: str) -> Array:
    return _energy(found, name) / found[_size_name(name)]


def _energy(found: Mapping[str, Array], name: str) -> Array:
    return np.maximum(found[_energy_name(name)], 1e-30)


def _energy_name(tensor: str) -> str:
    return f"{tensor}/energy"


def _size_name(tensor: str) -> str:
    return f"{tensor}/size"


def _noise(layer: Layer, precision: str) -> str:
    return f"{layer.result}/{precision}/noise"


def _reduce(model: ir.Model, value: ir.Value, op_type: str, name: str) -> str:
    """A scalar of a tensor as an output of the graph."""
    attributes = {"keepdims": 0} if op_type == "ReduceSumSquare" else {}
    node = _add(model, value.producer(), op_type, [value], name, attributes)
    node.outputs[0].dtype = ir.DataType.INT64 if op_type == "Size" else ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape([])
    model.graph.outputs.append(node.outputs[0])
    return name


def _add(model: ir.Model, after: ir.Node | None, op_type: str, inputs: list[ir.Value | None], name: str,
         attributes: Mapping[str, Any] | None = None) -> ir.Node:
    node = ir.node(op_type, inputs, attributes or {}, name=name)
    node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    if after is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(after, node)
    return node
