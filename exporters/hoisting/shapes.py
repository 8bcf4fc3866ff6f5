"""Shapes of all values of a graph in terms of its axes, found by inferring them at two sets of sizes.

Imports onnx; import it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

READ_ELEMENTS = 1024  # constants up to here may be sizes, and are given to the inference
Dims = tuple[int | str, ...]
_Found = dict[str, tuple[int, tuple[int | None, ...]]]


@dataclass(frozen=True)
class Shapes:
    """What is known of the values of a graph.

    Attributes:
        dims: value -> sizes, those that follow an axis by its name; of a value whose sizes are unknown, or are products
            or sums of axes, nothing.
        usual: value -> its shape at the usual sizes of the axes, for one row.
        dtypes: value -> element type.
    """

    dims: Mapping[ir.Value, Dims] = field(default_factory=dict)
    usual: Mapping[ir.Value, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[ir.Value, ir.DataType] = field(default_factory=dict)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type of a value, None if it is unknown or no tensor."""
        return self.dtypes.get(value)

    def bytes(self, value: ir.Value) -> int | None:
        """Size of one row of a value at the usual sizes; None if it is unknown."""
        if value not in self.usual or value not in self.dtypes:
            return None
        count = 1
        for size in self.usual[value]:
            count *= size
        return count * self.dtypes[value].bitwidth // 8


def find_shapes(model: ir.Model, usual: Mapping[str, int], batch: str) -> Shapes:
    """Infer shapes at two sets of sizes: what grows with one axis is that axis, what stays is a number.

    Args:
        model: its inputs have named dimensions.
        usual: axis -> size that it mostly has.
        batch: the axis of rows.
    """
    names = list(usual)
    # Multiples of 64: networks halve sizes, and each axis has its own.
    first = {name: 64 * (2 + 3 * i) for i, name in enumerate(names)}
    second = {name: 64 * (3 + 5 * i) for i, name in enumerate(names)}
    skeleton = _without_weights(model)
    a, b, common = (_inferred(skeleton, sizes) for sizes in (first, second, {**usual, batch: 1}))
    symbols = {(first[name], second[name]): name for name in names}
    dims: dict[ir.Value, Dims] = {}
    shapes: dict[ir.Value, tuple[int, ...]] = {}
    dtypes: dict[ir.Value, ir.DataType] = {}
    for value in _values(model):
        name = value.name or ""
        if name in common:
            dtypes[value] = ir.DataType(common[name][0])
            known = [d for d in common[name][1] if d is not None]
            if len(known) == len(common[name][1]):
                shapes[value] = tuple(known)
        if name in a and name in b and len(a[name][1]) == len(b[name][1]):
            pairs = zip(a[name][1], b[name][1], strict=True)
            found = [x if x == y else symbols.get((x or 0, y or 0)) for x, y in pairs]
            exact = [d for d in found if d is not None]
            if len(exact) == len(found):
                dims[value] = tuple(exact)
    return Shapes(dims, shapes, dtypes)


def _values(model: ir.Model) -> list[ir.Value]:
    made = [value for node in model.graph for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *made]


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph with every weight as an input: what is inferred needs their shapes alone."""
    graph = onnx.GraphProto(name="main")
    for value in model.graph.inputs:
        graph.input.append(ir.serde.serialize_value(value))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.size <= READ_ELEMENTS and not tensor.dtype.is_floating_point():
            graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        else:
            shape = [int(d) for d in tensor.shape.numpy()]
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
    graph.node.extend(ir.serde.serialize_node(node) for node in model.graph)
    for value in model.graph.outputs:
        graph.output.append(onnx.ValueInfoProto(name=value.name))
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version,
                                  functions=[ir.serde.serialize_function(f) for f in model.functions.values()])


def _inferred(skeleton: onnx.ModelProto, sizes: Mapping[str, int]) -> _Found:
    """Type and shape of each value with given sizes of the axes."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes.get(dim.dim_param, 1)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found: _Found = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.elem_type and kind.HasField("shape"):
            found[value.name] = kind.elem_type, tuple(
                d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    for tensor in inferred.initializer:
        found[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return found
