"""Emulates on a CPU what a 16-bit graph computes on hardware with 16-bit operators.

ONNX Runtime's CPU provider runs float16 operators in float32 and drops the casts between them, so an intermediate
value of 200,000 passes through unharmed that is infinite on a GPU (measured: tests/exporters/test_onnx_precision.py).
Parity of a 16-bit graph is therefore proven on its emulation: the same nodes in float32, each result rounded to 16
bits and back by explicit casts, which ONNX Runtime keeps. It models accumulation in float32 (tensor cores'), results
in 16 bits.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.precision.element_types import FLOAT, element_types
from exporters.precision.float32_nodes import MOVES
from exporters.precision.sixteen_bits import load, save

_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulate(source: Path, destination: Path) -> int:
    """Write a graph of float32 operators that rounds where `source` holds 16-bit values.

    Args:
        source: graph with float16 or bfloat16 inside; external weights are memory-mapped.
        destination: the emulation, with the weights still in 16 bits.

    Returns:
        how many results are rounded; 0 if the graph had nothing in 16 bits.
    """
    model = load(source, "")
    graph, types = model.graph, element_types(model)
    rounded = 0
    for value in list(graph.initializers.values()):
        if types.get(value) in _LOW and value.uses():
            uses = tuple(value.uses())
            wide = _cast(graph, graph[0], value, FLOAT, before=True)
            for use in uses:
                use.node.replace_input_with(use.idx, wide)
    for node in list(graph):
        for value in node.outputs:
            low = types.get(value)
            if low not in _LOW:
                continue
            if node.op_type in MOVES and not node.domain:
                value.type = ir.TensorType(FLOAT)  # moves what is rounded already
                continue
            rounded += 1
            uses = tuple(value.uses())
            narrow = value
            after = node
            if node.op_type != "Cast":
                value.type = ir.TensorType(FLOAT)
                narrow = _cast(graph, node, value, low)
                producer = narrow.producer()
                assert producer is not None
                after = producer
            wide = _cast(graph, after, narrow, FLOAT)
            for use in uses:
                use.node.replace_input_with(use.idx, wide)
    common.TopologicalSortPass()(model)
    save(model, destination)
    return rounded


def _cast(graph: ir.Graph, place: ir.Node, value: ir.Value, dtype: ir.DataType, *, before: bool = False) -> ir.Value:
    output = ir.Value(name=f"{value.name}_to_{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape)
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"round/{output.name}")
    if before:
        graph.insert_before(place, node)
    else:
        graph.insert_after(place, node)
    return output
