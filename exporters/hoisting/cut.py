"""Chooses which values cross from what is computed beforehand into the step graph: the cut that saves most time.

A value that crosses costs what feeding it costs; an operator that stays costs its own time at every step. Operators may
stand on both sides. The cheapest choice is a minimum cut (Chen et al., arXiv 1604.06174, choose recomputation so by
hand; torch's partitioner by the same flow), found exactly. Imports scipy and onnx_ir; import it inside the function
that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from exporters.hoisting.classes import Classes, Kind
from exporters.hoisting.dependence import inputs_of

# What only renames or moves elements costs nothing where it stays: runtimes do it inside what reads the result. So a
# cut lies before it, where fused attention expects its keys and values.
FREE = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Shape", "Size"}
MOST_BYTES = 64 << 20  # of one prompt, or of one row at all steps of a schedule
MOST_STEPS = 50  # that a table of timesteps is counted with
_UNIT_SECONDS, _LARGEST, _ENDLESS = 1e-8, 1 << 28, 1 << 30  # the flow counts in 32-bit integers
_PRICES = (0.0, *(1e-12 * 4.0**i for i in range(40)))  # seconds for each byte that is stored


@dataclass(frozen=True)
class Speeds:
    """What a target's steps are estimated with. Only ratios matter, and those of a cut worth making are far from 1.

    Attributes:
        macs, weights, elements: multiply-accumulates, bytes of weights and bytes of activations, each per second.
        fed: bytes per second of what a caller feeds.
        node, input: seconds for each operator that runs, and for each input that is fed.
    """

    macs: float
    weights: float
    elements: float
    fed: float
    node: float
    input: float


# A CPU of two cores reads what it is fed where it lies. A GPU gets it over PCIe at every step, and computes a thousand
# times as fast: there, keys and values of a prompt are cheaper to compute again than to send.
CPU = Speeds(1e11, 1e10, 1e10, 1e10, 2e-6, 2e-6)
GPU = Speeds(2e14, 2e12, 2e12, 1e10, 2e-6, 2e-6)
SPEEDS: Mapping[str, Speeds] = {"onnxruntime": CPU, "openvino": CPU, "tensorrt": GPU, "tensorrt-rtx": GPU}


def choose_cut(model: ir.Model, classes: Classes, speeds: Speeds) -> dict[ir.Value, Kind]:
    """The values that cross, each with what it is computed for.

    What would take more than `MOST_BYTES` is priced by its bytes, ever higher, until it fits.
    """
    for price in _PRICES:
        crossing = _cheapest(model, classes, speeds, price)
        if all(size <= MOST_BYTES for size in stored_bytes(crossing, classes).values()):
            return crossing
    return {}


def stored_bytes(crossing: Mapping[ir.Value, Kind], classes: Classes) -> dict[Kind, int]:
    """Bytes of each kind for one prompt, or for one row at `MOST_STEPS` timesteps."""
    sizes: dict[Kind, int] = {}
    for value, kind in crossing.items():
        sizes[kind] = sizes.get(kind, 0) + _stored(value, kind, classes)
    return sizes


def _stored(value: ir.Value, kind: Kind, classes: Classes) -> int:
    return (classes.shapes.bytes(value) or 0) * (1 if kind is Kind.PROMPT else MOST_STEPS)


def _cheapest(model: ir.Model, classes: Classes, speeds: Speeds, price: float) -> dict[ir.Value, Kind]:
    """The minimum cut that lies nearest to the inputs.

    Places of the flow: 0 the source, 1 the sink, one for each node that could leave and one for each of its values.
    On the source's side a node is computed beforehand; a value on the sink's side is there in the step graph.
    """
    nodes = [node for node in model.graph if classes.leaves(node)]
    place: dict[object, int] = {}
    for thing in (thing for node in nodes for thing in (node, *node.outputs)):
        place[thing] = 2 + len(place)
    capacity: dict[tuple[int, int], float] = {}
    for node in nodes:
        capacity[0, place[node]] = _seconds(node, classes, speeds)
        for value in inputs_of(node):
            if value in place:
                capacity[place[value], place[node]] = math.inf
        for value in node.outputs:
            kind = classes.kind_to_cross(value)
            stored = price * _stored(value, kind, classes) if kind is not None else 0.0
            seconds = math.inf if kind is None else speeds.input + stored + (
                classes.shapes.bytes(value) or 0) / speeds.fed
            capacity[place[node], place[value]] = seconds
            if value.is_graph_output() or any(use.node not in place for use in value.uses()):
                capacity[place[value], 1] = math.inf
    before = _source_side(capacity, 2 + len(place))
    return {value: kind for node in nodes if place[node] in before for value in node.outputs
            if place[value] not in before and (kind := classes.kind_to_cross(value)) is not None}


def _source_side(capacity: Mapping[tuple[int, int], float], places: int) -> set[int]:
    """What the source still reaches once no more can flow."""
    pairs, seconds = np.array(list(capacity), np.int32).reshape(-1, 2), np.array(list(capacity.values()))
    # All that can flow is less than what is endless; what costs more than all is never cut.
    unit = max(_UNIT_SECONDS, seconds[pairs[:, 0] == 0].sum() / _LARGEST)
    limits = np.where(np.isinf(seconds), _ENDLESS, np.minimum(np.ceil(seconds / unit), 2 * _LARGEST)).astype(np.int32)
    network = csr_array((limits, (pairs[:, 0], pairs[:, 1])), shape=(places, places))
    rest = network - maximum_flow(network, 0, 1).flow
    rest.data = (rest.data > 0).astype(np.int32)
    rest.eliminate_zeros()
    return set(breadth_first_order(rest, 0, return_predecessors=False).tolist())


def _seconds(node: ir.Node, classes: Classes, speeds: Speeds) -> float:
    """What a node costs for one row of a step."""
    if node.op_type in FREE and node.domain == "":
        return 0.0
    shapes = classes.shapes
    given = [shapes.usual.get(value, ()) for value in node.outputs]
    weights = [v for v in inputs_of(node) if v.is_initializer()]
    moved = sum(shapes.bytes(v) or 0 for v in (*inputs_of(node), *node.outputs) if not v.is_initializer())
    macs = float(sum(math.prod(shape) for shape in given)) * _products(node, classes)
    read = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
    return macs / speeds.macs + read / speeds.weights + moved / speeds.elements + speeds.node


def _products(node: ir.Node, classes: Classes) -> int:
    """Multiplications for each element of the result."""
    shapes = [classes.shapes.usual.get(v, ()) if v is not None else () for v in node.inputs]
    if node.op_type == "MatMul" and shapes[0]:
        return shapes[0][-1]
    if node.op_type == "Gemm" and shapes[1]:
        turned = "transB" in node.attributes and node.attributes["transB"].as_int()
        return shapes[1][1 if turned else 0]
    return math.prod(shapes[1][1:]) if node.op_type == "Conv" and len(shapes) > 1 else 1
