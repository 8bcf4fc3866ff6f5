"""Stores text encoders in few bits: products in 4-bit blocks, embeddings as 8-bit rows, in the form a runtime reads.

`calibration.integers.int4_blocks` computes the integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.graphs.layers import BLOCKS, EMBEDDING, FLOAT, WEIGHT, Layer, find_embeddings, find_layers
from calibration.graphs.qdq_placement import QuantizeReport, Writer, rewrite, save, weight_bytes
from calibration.integers.external_data import array_of
from calibration.integers.int4_blocks import GROUP, group_scales, pack_nbits, to_int4
from calibration.integers.int8 import STORED_LIMIT, lazy_integers, weight_scale
from calibration.integers.ranges import Scheme

MICROSOFT = "com.microsoft"
INT4_OPSET, INT4_IR = 21, 10  # the first ONNX with int4 and blocks in DequantizeLinear
INT8_ARITHMETIC = 4  # MatMulNBits' accuracy_level: the inputs are rounded to 8 bits, block by block, in each call


@dataclass(frozen=True)
class BlockForm:
    """How a runtime reads 4-bit blocks.

    Attributes:
        operator: "MatMulNBits", ONNX Runtime's own product, which CPUs and CUDA compute without unpacking the weight;
            "DequantizeLinear" in front of the product, ONNX's own, which OpenVINO keeps packed and TensorRT fuses.
        positive: scales above 0 only; TensorRT wants them so.
        embeddings: store embeddings in 8 bits. TensorRT takes integer constants in front of DequantizeLinear alone.
    """

    operator: Literal["MatMulNBits", "DequantizeLinear"] = "DequantizeLinear"
    positive: bool = False
    embeddings: bool = True


def find_stored(model: ir.Model, form: BlockForm) -> list[Layer]:
    """Every layer that `quantize_int4` may be asked to store."""
    return [*find_layers(model), *(find_embeddings(model) if form.embeddings else ())]


def quantize_int4(source: Path, destination: Path, assignment: Mapping[str, str], form: BlockForm, scheme: Scheme,
                  ) -> QuantizeReport:
    """Store the weights of a graph.

    Args:
        source: float32 graph; external weights are memory-mapped and converted one at a time while writing.
        destination: written whole or not at all.
        assignment: "w4", "w8" or "float" for each layer of `find_stored`. A product that the form has no blocks for
            becomes "w8"; the report says so.
        form: of the target.
        scheme: integers of the target.

    Raises:
        UnavailableError: the disk is full.
    """
    model = ir.load(source)
    before = weight_bytes(model)
    layers, nodes = find_stored(model, form), {node.name: node for node in model.graph}
    found = dict(assignment)
    writer, parameters = Writer(model, {}, scheme), Counter[str]()
    for layer in layers:
        node = nodes[layer.node]
        if found[layer.node] == BLOCKS and not _fits(model, node, layer, form):
            found[layer.node] = WEIGHT
        parameters[found[layer.node]] += layer.parameters
        if (place := _placer(layer, found[layer.node], form)) is not None:
            place(writer, model, node, layer, form)
    rewrite(model, found, {}, scheme)
    save(model, destination)
    return QuantizeReport(found, dict(parameters), before, weight_bytes(model))


Place = Callable[[Writer, ir.Model, ir.Node, Layer, BlockForm], None]


def _placer(layer: Layer, precision: str, form: BlockForm) -> Place | None:
    """What replaces a layer; None for those that `rewrite` takes, or nobody."""
    if precision == BLOCKS:
        return _nbits if form.operator == "MatMulNBits" else _dequantize
    return _rows if layer.op_type == EMBEDDING and precision != FLOAT else None


def _fits(model: ir.Model, node: ir.Node, layer: Layer, form: BlockForm) -> bool:
    """Whether the form has blocks for a product: whole groups, or a MatMulNBits with nothing else to scale or add."""
    if form.operator == "DequantizeLinear":
        return bool(_weight(model, layer).shape[1] % GROUP == 0)
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = bias is None or (bias.shape is not None and bias.shape == ir.Shape([_weight(model, layer).shape[0]]))
    return bool(factors == [1.0, 1.0] and plain)


def _weight(model: ir.Model, layer: Layer) -> NDArray[np.float32]:
    """(outputs, inputs) of a product; a view."""
    tensor = model.graph.initializers[layer.weight].const_value
    assert tensor is not None
    values = array_of(tensor)
    return values.T if layer.axis == 1 else values


def _nbits(writer: Writer, model: ir.Model, node: ir.Node, layer: Layer, form: BlockForm) -> None:
    """x W + b -> MatMulNBits."""
    weight, result = _weight(model, layer), node.outputs[0]
    outputs, inputs = weight.shape
    name = f"{layer.weight}/int4"
    if name not in model.graph.initializers:
        scales = group_scales(weight, positive=form.positive)
        shape = (outputs, scales.shape[1], GROUP // 2)
        _lazy(writer, name, lambda: pack_nbits(to_int4(weight, scales)), ir.DataType.UINT8, shape)
        writer.constant(f"{name}/scale", scales.reshape(-1))
    initializers = model.graph.initializers
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    values: list[Any] = [node.inputs[0], initializers[name], initializers[f"{name}/scale"]]
    values += [] if bias is None else [None, None, bias]  # between them: zero points and the groups' order
    product = writer.node("MatMulNBits", values, f"{result.name}/int4", node, {
        "K": inputs, "N": outputs, "bits": 4, "block_size": GROUP, "accuracy_level": INT8_ARITHMETIC}, domain=MICROSOFT)
    product.outputs[0].shape = result.shape
    product.name = node.name
    writer.take_over(node, product.outputs[0])
    model.opset_imports.setdefault(MICROSOFT, 1)


def _dequantize(writer: Writer, model: ir.Model, node: ir.Node, layer: Layer, form: BlockForm) -> None:
    """W -> DequantizeLinear of int4 in blocks along the inputs; W keeps its layout."""
    name = f"{layer.weight}/int4"
    if name not in model.graph.initializers:
        weight, turned = _weight(model, layer), layer.axis == 1
        scales = group_scales(weight, positive=form.positive)

        def integers() -> NDArray[Any]:
            found = to_int4(weight, scales)
            return (found.T if turned else found).astype(ir.DataType.INT4.numpy())

        _lazy(writer, name, integers, ir.DataType.INT4, weight.shape[::-1] if turned else weight.shape)
        scale = writer.constant(f"{name}/scale", np.ascontiguousarray(scales.T) if turned else scales)
        made = writer.node("DequantizeLinear", [model.graph.initializers[name], scale], f"{name}/dequantized", None,
                           {"axis": 1 - layer.axis, "block_size": GROUP})
        made.outputs[0].shape = model.graph.initializers[name].shape
    found = next(use.node for use in model.graph.initializers[name].uses())
    node.replace_input_with(1, found.outputs[0])
    # From 20 to 21 these graphs change in nothing but the types that operators take.
    model.opset_imports[""] = max(model.opset_imports[""], INT4_OPSET)
    model.ir_version = max(model.ir_version or 0, INT4_IR)


def _rows(writer: Writer, model: ir.Model, node: ir.Node, layer: Layer, form: BlockForm) -> None:
    """Look up int8 rows and the scale of each: the table is never unpacked, in any runtime."""
    table, numbers, result = model.graph.initializers[layer.weight].const_value, node.inputs[1], node.outputs[0]
    assert table is not None
    assert numbers is not None
    name = f"{layer.weight}/int8"
    if name not in model.graph.initializers:
        scale = weight_scale(array_of(table), 0, STORED_LIMIT)
        writer.register(name, lazy_integers(table, scale, 0, STORED_LIMIT, name), ir.Shape(table.shape.numpy()))
        writer.constant(f"{name}/scale", scale[:, None])
    initializers = model.graph.initializers
    rows = writer.node("Gather", [initializers[name], numbers], f"{result.name}/int8", node, {}, dtype=ir.DataType.INT8)
    scales = writer.node("Gather", [initializers[f"{name}/scale"], numbers], f"{result.name}/scale", rows, {})
    wide = writer.node("Cast", [rows.outputs[0]], f"{result.name}/float", scales, {"to": int(ir.DataType.FLOAT)})
    scaled = writer.node("Mul", [wide.outputs[0], scales.outputs[0]], f"{result.name}/scaled", wide, {})
    for made in (rows, wide, scaled):
        made.outputs[0].shape = result.shape
    writer.take_over(node, scaled.outputs[0])


def _lazy(writer: Writer, name: str, convert: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: tuple[int, ...],
          ) -> None:
    """Register a tensor that is computed when it is written."""
    tensor = ir.LazyTensor(lambda: ir.Tensor(convert(), dtype=dtype, name=name), dtype, ir.Shape(shape), name=name)
    writer.register(name, tensor, ir.Shape(shape))
