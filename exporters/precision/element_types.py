"""Infers element types with ONNX's operator schemas: of each value of a graph, and what each input of a node takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic
# Outputs that follow an attribute, not an input: the attribute's name and what holds without it.
_BY_ATTRIBUTE = {"Cast": ("to", None), "RandomNormal": ("dtype", FLOAT), "RandomUniform": ("dtype", FLOAT),
                 "EyeLike": ("dtype", None), "RandomNormalLike": ("dtype", None), "RandomUniformLike": ("dtype", None),
                 "Bernoulli": ("dtype", None)}


@dataclass(frozen=True)
class Signature:
    """Type strings of a node's places as its schema writes them ("T", "tensor(int64)"), and what a variable may be."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]

    def accepts(self, place: str, dtype: ir.DataType) -> bool:
        """Whether a place may hold a tensor of `dtype`."""
        name = f"tensor({_SCHEMA_NAMES.get(dtype, dtype.name.lower())})"
        return name == place or name in self.allowed.get(place, frozenset())


_SCHEMA_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
                 ir.DataType.DOUBLE: "double"}
_BY_NAME = {f"tensor({_SCHEMA_NAMES.get(d, d.name.lower())})": d for d in ir.DataType}


def signature(node: ir.Node, opsets: dict[str, int]) -> Signature | None:
    """The node's schema, variadic places spelled out; None for an operator that ONNX does not define."""
    found = _schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    if found is None:
        return None
    inputs, outputs, allowed, spread_in, spread_out = found
    return Signature(_spread(inputs, len(node.inputs), spread_in), _spread(outputs, len(node.outputs), spread_out),
                     allowed)


@lru_cache(maxsize=1024)
def _schema(op_type: str, version: int, domain: str) -> (
        tuple[tuple[str, ...], tuple[str, ...], dict[str, frozenset[str]], bool, bool] | None):
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    in_end, out_end = (bool(places) and places[-1].option == _VARIADIC for places in (schema.inputs, schema.outputs))
    return (tuple(p.type_str for p in schema.inputs), tuple(p.type_str for p in schema.outputs), allowed, in_end,
            out_end)


def _spread(places: Sequence[str], count: int, variadic: bool) -> tuple[str, ...]:
    if variadic and count > len(places):
        return (*places, *[places[-1]] * (count - len(places)))
    return tuple(places[:count])


def element_types(model: ir.Model) -> dict[ir.Value, ir.DataType]:
    """Element type of every value that has a known one; stated types win, the rest follows from the schemas."""
    types: dict[ir.Value, ir.DataType] = {}
    opsets = dict(model.opset_imports)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _state(types, value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                for value in (*attribute.as_graph().inputs, *attribute.as_graph().initializers.values()):
                    _state(types, value)
        for index, value in enumerate(node.outputs):
            if value.dtype is not None:
                types[value] = value.dtype
            elif (dtype := _inferred(node, index, types, opsets)) is not None:
                types[value] = dtype
    return types


def _state(types: dict[ir.Value, ir.DataType], value: ir.Value) -> None:
    if value.const_value is not None:
        types[value] = value.const_value.dtype
    elif value.dtype is not None:
        types[value] = value.dtype


def _inferred(node: ir.Node, index: int, types: dict[ir.Value, ir.DataType], opsets: dict[str, int],
              ) -> ir.DataType | None:
    if node.op_type in _BY_ATTRIBUTE and not node.domain:
        name, default = _BY_ATTRIBUTE[node.op_type]
        stated = node.attributes.get_int(name, 0)
        return ir.DataType(stated) if stated else default or _first(node, types)
    if node.op_type in ("Constant", "ConstantOfShape") and (stored := node.attributes.get("value")) is not None:
        return stored.as_tensor().dtype
    found = signature(node, opsets)
    if found is None:
        return _first(node, types)
    place = found.outputs[index] if index < len(found.outputs) else ""
    if place in _BY_NAME:
        return _BY_NAME[place]
    for value, wanted in zip(node.inputs, found.inputs, strict=False):
        if wanted == place and value is not None and value in types:
            return types[value]
    return FLOAT if node.op_type in ("Constant", "ConstantOfShape") else None


def _first(node: ir.Node, types: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    return next((types[v] for v in node.inputs if v is not None and v in types), None)
