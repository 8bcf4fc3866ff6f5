"""Removes arithmetic on sizes from a graph: targets of Reshape become constants, or the shape of a known value.

Needs the symbolic shapes that the exporter leaves on values, so it runs before they are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_edits import (
    attribute,
    constant_of,
    made_by,
    new_node,
    only_user,
    put_before,
    replace,
    small_constant,
)

Known = tuple[int | str, ...]


class ShapeOf:
    """Targets for Reshape taken from the first value that has the wanted symbolic shape."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._first: dict[Known, tuple[int, ir.Value]] = {}
        self._nodes: dict[Known, ir.Node] = {}
        self._order = {node: i for i, node in enumerate(model.graph)}
        for value in model.graph.inputs:
            self._remember(value, -1)
        for node, i in self._order.items():
            for value in node.outputs:
                self._remember(value, i)

    def _remember(self, value: ir.Value, position: int) -> None:
        shape = known(value.shape)
        if shape is not None and len(shape) > 1:
            self._first.setdefault(shape, (position, value))

    def target(self, shape: Known, user: ir.Node) -> ir.Value | None:
        """A 1-D int64 value that equals `shape` at run time, available before `user`; None if nothing has it."""
        position, value = self._first.get(shape, (-1, None))
        if value is None or position >= self._order.get(user, -1):
            return None
        if shape not in self._nodes:
            node = new_node("Shape", [value], value.producer() or user)
            node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([len(shape)]), ir.DataType.INT64
            maker = value.producer()
            if maker is None:
                put_before(self._model.graph[0], [node])
            else:
                self._model.graph.insert_after(maker, node)
            self._nodes[shape] = node
        return self._nodes[shape].outputs[0]


def known(shape: Any) -> Known | None:
    """A shape without unknown dimensions, symbols as text; None otherwise."""
    if shape is None or any(not isinstance(d, int) and d.value is None for d in shape):
        return None
    return tuple(d if isinstance(d, int) else str(d.value) for d in shape)


def transpose_flat(model: ir.Model) -> None:
    """Between images and tokens, transpose three dimensions instead of four.

    (B, C, H, W) -> Transpose -> Reshape -> (B, HW, C) becomes Reshape -> Transpose, and likewise on the way back.
    """
    shapes = ShapeOf(model)
    for node in [n for n in model.graph if n.op_type == "Transpose"]:
        order, reader, maker = attribute(node, "perm"), only_user(node.outputs[0]), made_by(node.inputs[0], "Reshape")
        if order == (0, 2, 3, 1) and reader is not None and reader.op_type == "Reshape":
            image, tokens = (known(v.shape) if v is not None else None for v in (node.inputs[0], reader.outputs[0]))
            if image and tokens and len(tokens) == 3 and tokens[2] == image[1] and isinstance(image[1], int):
                target = _constant(model, [0, image[1], -1])
                _swap(node, reader, "Reshape", target, (tokens[0], tokens[2], tokens[1]), tokens)
        elif order == (0, 3, 1, 2) and maker is not None:
            tokens, image = (known(v.shape) if v is not None else None for v in (maker.inputs[0], node.outputs[0]))
            if image and tokens and len(tokens) == 3 and tokens[2] == image[1]:
                shape = shapes.target(image, maker)
                if shape is not None:
                    _swap(maker, node, "Transpose", shape, (tokens[0], tokens[2], tokens[1]), image)


def _swap(first: ir.Node, second: ir.Node, new_first: str, target: ir.Value, middle: Known, final: Known) -> None:
    """Replace two nodes by a Reshape to `target` and a Transpose of the last two of three dimensions."""
    value, dtype = first.inputs[0], first.inputs[0].dtype if first.inputs[0] is not None else None
    nodes: list[ir.Node] = []
    for op_type, shape in ((new_first, middle), ("Transpose" if new_first == "Reshape" else "Reshape", final)):
        if op_type == "Reshape":
            node = new_node("Reshape", [value, target], second)
        else:
            node = new_node("Transpose", [value], second, {"perm": [0, 2, 1]})
        value = node.outputs[0]
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype) if dtype is not None else None
        nodes.append(node)
    put_before(second, nodes)
    replace(second.outputs[0], nodes[-1].outputs[0])


def simplify_targets(model: ir.Model) -> None:
    """Replace computed targets of Reshape: by a constant (0 copies, one -1 is inferred), else by a known Shape.

    The exporter computes every target from Shape, Slice, floor division and Concat; of a U-Net's nodes that was a
    fifth.
    """
    shapes = ShapeOf(model)
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        data, target = node.inputs[0], node.inputs[1]
        wanted = _wanted(node)
        if data is None or target is None or constant_of(target) is not None or wanted is None:
            continue
        constant = _as_constant(known(data.shape) or (), wanted)
        new = _constant(model, constant) if constant is not None else shapes.target(wanted, node)
        if new is not None and new is not target:
            node.replace_input_with(1, new)
            node.attributes.pop("allowzero", None)
            if node.outputs[0].shape is None:
                node.outputs[0].shape = ir.Shape(wanted)


def _wanted(node: ir.Node) -> Known | None:
    """What is known about the shape of a Reshape's output."""
    if shape := known(node.outputs[0].shape):
        return shape
    maker = made_by(node.inputs[1], "Shape")
    if maker is None or attribute(maker, "start", 0) or "end" in maker.attributes or maker.inputs[0] is None:
        return None
    return known(maker.inputs[0].shape)


def _as_constant(have: Known, want: Known) -> list[int] | None:
    """Target of a Reshape without symbols, or None if two dimensions would have to be inferred."""
    result: list[int] = []
    for i, dim in enumerate(want):
        copied = i < len(have) and have[i] == dim
        result.append(dim if isinstance(dim, int) else 0 if copied else -1)
    return result if result.count(-1) <= 1 else None


def _constant(model: ir.Model, dims: Sequence[int]) -> ir.Value:
    name = "to_" + "_".join("m1" if d == -1 else str(d) for d in dims)
    return small_constant(model, np.array(dims, np.int64), name)
