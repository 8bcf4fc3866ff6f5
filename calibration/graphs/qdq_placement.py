"""Places Q/DQ nodes: turns a float32 ONNX graph into one with 8-bit weights and, where assigned so, 8-bit activations.

Weights in 4 bits are placed by `calibration.graphs.text_encoder_int4`.

Explicit Q/DQ in ONNX's own operators, which ONNX Runtime, OpenVINO and TensorRT all read. Weights are symmetric int8
with a scale for each output channel (Krishnamoorthi, arXiv 1806.08342) and are stored as int8: the file shrinks.
Nothing is placed around the products, softmax and sums inside attention, where it would break their fused kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from calibration.graphs.layers import DYNAMIC, FLOAT, STATIC, WEIGHT, Layer, find_layers
from calibration.integers.external_data import array_of, make_writable
from calibration.integers.int8 import STORED_LIMIT, Integers, lazy_integers, to_integers, weight_scale
from calibration.integers.ranges import Range, Scheme
from runtimes.bundle.folder import translated_disk_errors

EXTERNAL_ABOVE_BYTES = 1 << 30
TINY = 1e-30  # changes no result of a convolution, and no optimizer takes it for 0


@dataclass(frozen=True)
class QuantizeReport:
    """What was placed.

    Attributes:
        assignment: node -> "float", "w8", "w8a8" or "w8a8-dynamic".
        parameters: precision -> number of weights of layers in it.
        bytes_before, bytes_after: of all initializers.
    """

    assignment: Mapping[str, str]
    parameters: Mapping[str, int]
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """For the manifest's details."""
        counts = Counter(self.assignment.values())
        return {"layers": dict(sorted(counts.items())), "parameters": dict(sorted(self.parameters.items())),
                "precision_map": dict(sorted(self.assignment.items())),
                "weight_bytes": [self.bytes_before, self.bytes_after]}


def tensors_to_observe(model: ir.Model, assignment: Mapping[str, str], scheme: Scheme) -> list[str]:
    """Names of the tensors whose ranges `quantize` needs."""
    chosen = [layer for layer in find_layers(model) if assignment[layer.node] == STATIC]
    names = [layer.source for layer in chosen]
    if scheme.quantize_outputs:
        names += [layer.result for layer in chosen if layer.op_type == "Conv"]
    return list(dict.fromkeys(names))


def quantize(source: Path, destination: Path, assignment: Mapping[str, str], ranges: Mapping[str, Range],
             scheme: Scheme, means: Mapping[str, NDArray[np.float32]] | None = None) -> QuantizeReport:
    """Quantize a graph.

    Args:
        source: float32 graph; external weights are memory-mapped and converted one at a time while writing.
        destination: written whole or not at all.
        assignment: from `layers.assign`, for every layer.
        ranges: of `tensors_to_observe`.
        scheme: integers of the target.
        means: of the inputs of convolutions, tensor -> (C,): what rounding does to their mean output is taken off
            their biases.

    Raises:
        UnavailableError: the disk is full.
    """
    model = ir.load(source)
    before = weight_bytes(model)
    if means:
        correct_biases(model, assignment, means, scheme)
    report = rewrite(model, assignment, ranges, scheme)
    save(model, destination)
    return QuantizeReport(dict(assignment), report, before, weight_bytes(model))


def rewrite(model: ir.Model, assignment: Mapping[str, str], ranges: Mapping[str, Range], scheme: Scheme,
            stored: Integers | None = None) -> dict[str, int]:
    """Place Q/DQ in a model; returns precision -> number of weights.

    With `stored`, the integers are read from there and what is written must lie in its folder.
    """
    writer = Writer(model, ranges, scheme, stored)
    nodes = {node.name: node for node in model.graph}
    parameters: Counter[str] = Counter()
    for layer in find_layers(model):
        parameters[assignment[layer.node]] += layer.parameters
        writer.place(nodes[layer.node], layer, assignment[layer.node])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    common.TopologicalSortPass()(model)
    return dict(parameters)


def correct_biases(model: ir.Model, assignment: Mapping[str, str], means: Mapping[str, NDArray[np.float32]],
                   scheme: Scheme) -> int:
    """Take what rounding does to the mean output of convolutions off their biases.

    E[W x] - E[Q(W) x] = (W - Q(W)) E[x] per output channel (Nagel et al., arXiv 1906.04721, section 4.2); zero padding
    is not accounted for.

    Args:
        model: float32, before `rewrite`; changed in place.
        assignment: precision of each layer.
        means: tensor -> (C,) mean.
        scheme: integers of the target.

    Returns:
        number of biases that were changed.
    """
    nodes = {node.name: node for node in model.graph}
    changed = 0
    for layer in find_layers(model):
        node = nodes[layer.node]
        if layer.op_type != "Conv" or assignment[layer.node] not in (STATIC, WEIGHT) or len(node.inputs) < 3:
            continue
        if layer.source not in means or node.attributes.get_int("group", 1) != 1:
            continue
        value, bias = node.inputs[1], node.inputs[2]
        if value is None or value.const_value is None or bias is None or bias.const_value is None:
            continue
        weight = array_of(value.const_value)
        limit = _limit(assignment[layer.node], scheme)
        scale = weight_scale(weight, 0, limit)
        rounded = to_integers(weight, scale, 0, limit) * scale.reshape(-1, 1, 1, 1)
        shift = ((weight - rounded).sum(axis=(2, 3)) @ means[layer.source]).astype(np.float32)
        name = f"{bias.name}/corrected"
        tensor = ir.tensor(array_of(bias.const_value) + shift, name=name)
        node.replace_input_with(2, ir.Value(name=name, shape=bias.shape, type=bias.type, const_value=tensor))
        model.graph.register_initializer(node.inputs[2])  # type: ignore[arg-type]
        changed += 1
    return changed


def save(model: ir.Model, destination: Path) -> None:
    """Write a graph; weights above 1 GiB go to `<name>.data` beside it.

    Raises:
        UnavailableError: the disk is full.
    """
    external = f"{destination.name}.data" if weight_bytes(model) > EXTERNAL_ABOVE_BYTES else None
    make_writable(model)
    if external is None:
        ir.external_data.load_to_model(model)
    with translated_disk_errors(destination):
        ir.save(model, destination, external_data=external)


def weight_bytes(model: ir.Model) -> int:
    """Of all initializers, those in other files among them."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _limit(precision: str, scheme: Scheme) -> int:
    return STORED_LIMIT if precision == WEIGHT else scheme.weight_limit


class Writer:
    """Places nodes in one model; activations and weights that several layers read are quantized once.

    Args:
        model: changed in place.
        ranges: of every tensor that `place` will quantize.
        scheme: integers of the target.
        stored: where weights were or will be converted, for several models made of one graph.
    """

    def __init__(self, model: ir.Model, ranges: Mapping[str, Range], scheme: Scheme, stored: Integers | None = None,
                 ) -> None:
        self._model, self._ranges, self._scheme, self._stored = model, ranges, scheme, stored
        self._activations: dict[ir.Value, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._dynamic: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def place(self, node: ir.Node, layer: Layer, precision: str) -> None:
        """Give one node with the weights of a layer its precision."""
        if precision == DYNAMIC:
            self.dynamic(node, layer)
        elif precision != FLOAT:
            if precision == STATIC:
                self.input(node)
            self.weight(node, layer, _limit(precision, self._scheme))
            if precision == STATIC and layer.op_type == "Conv":
                if self._scheme.give_biases:
                    self.bias(node, layer)
                if self._scheme.quantize_outputs:
                    self.output(node)

    def input(self, node: ir.Node) -> None:
        """Quantize what a layer reads."""
        value = node.inputs[0]
        assert value is not None
        if value in self._activations.values():
            return  # a convolution's output, quantized already
        if value not in self._activations:
            self._activations[value] = self._pair(value, value.producer())
        node.replace_input_with(0, self._activations[value])

    def output(self, node: ir.Node) -> None:
        """Quantize what a layer gives, for all of its readers."""
        value = node.outputs[0]
        if value.is_graph_output():
            return
        uses = tuple(value.uses())
        result = self._activations[value] = self._pair(value, node)
        for use in uses:
            use.node.replace_input_with(use.idx, result)

    def bias(self, node: ir.Node, layer: Layer) -> None:
        """Give a convolution a bias that is not 0 everywhere; one that is computed is left alone."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and (bias.const_value is None or array_of(bias.const_value).any()):
            return
        weight = self._model.graph.initializers[layer.weight].const_value
        assert weight is not None
        channels = weight.shape.numpy()[0]
        node.resize_inputs(3)
        node.replace_input_with(2, self.constant(f"tiny/{channels}", np.full(channels, TINY, np.float32)))

    def weight(self, node: ir.Node, layer: Layer, limit: int) -> None:
        """Replace a weight by its integers and a DequantizeLinear."""
        integers, scale = self._integers(layer, limit)
        name = f"{integers.name}/dequantized"
        if name not in self._weights:
            scales = self.constant(f"{integers.name}/scale", scale)
            zeros = self.constant(f"{integers.name}/zero", np.zeros(scale.shape, np.int8))
            dequantize = self.node("DequantizeLinear", [integers, scales, zeros], name, None, {"axis": layer.axis})
            self._weights[name] = dequantize.outputs[0]
        node.replace_input_with(1, self._weights[name])

    def dynamic(self, node: ir.Node, layer: Layer) -> None:
        """x W -> MatMulInteger of x quantized to its own range in each call, times both scales."""
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        if value not in self._dynamic:
            made = self.node("DynamicQuantizeLinear", [value], f"{value.name}/dynamic", value.producer(), {},
                              outputs=3)
            made.outputs[0].dtype = made.outputs[2].dtype = ir.DataType.UINT8
            made.outputs[1].dtype = ir.DataType.FLOAT
            self._dynamic[value] = made.outputs[0], made.outputs[1], made.outputs[2]
        integers, scale, zero = self._dynamic[value]
        weight, weight_scales = self._integers(layer, self._scheme.weight_limit)
        product = self.node("MatMulInteger", [integers, weight, zero], f"{result.name}/int32", node, {},
                             dtype=ir.DataType.INT32)
        cast = self.node("Cast", [product.outputs[0]], f"{result.name}/float", product,
                          {"to": int(ir.DataType.FLOAT)})
        factor = self.node("Mul", [scale, self.constant(f"{layer.weight}/scale", weight_scales)],
                            f"{result.name}/scale", cast, {})
        scaled = self.node("Mul", [cast.outputs[0], factor.outputs[0]], f"{result.name}/scaled", factor, {})
        self.take_over(node, scaled.outputs[0])

    def take_over(self, node: ir.Node, value: ir.Value) -> None:
        """Give the readers of a node's output another value, and remove the node."""
        result = node.outputs[0]
        if result.is_graph_output():
            value.name, result.name = result.name, None
            value.shape = result.shape
        ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
        self._model.graph.remove(node, safe=True)

    def _integers(self, layer: Layer, limit: int) -> tuple[ir.Value, NDArray[np.float32]]:
        weight = self._model.graph.initializers[layer.weight].const_value
        assert weight is not None
        name = f"{layer.weight}/int{limit.bit_length() + 1}"
        if self._stored is None:
            scale = weight_scale(array_of(weight), layer.axis, limit)
            tensor = lazy_integers(weight, scale, layer.axis, limit, name)
        else:
            tensor, scale = self._stored.of(weight, layer.axis, limit, name)
        if name not in self._model.graph.initializers:
            self.register(name, tensor, ir.Shape(weight.shape.numpy()))
        return self._model.graph.initializers[name], scale

    def _pair(self, value: ir.Value, after: ir.Node | None) -> ir.Value:
        """QuantizeLinear and DequantizeLinear behind a value."""
        scale, zero = self._scheme.scale_and_zero(*self._ranges[value.name or ""])
        dtype: Any = np.int8 if self._scheme.signed else np.uint8
        scales = self.constant(f"{value.name}/scale", np.asarray(scale))
        zeros = self.constant(f"{value.name}/zero", np.asarray(zero, dtype))
        quantized = self.node("QuantizeLinear", [value, scales, zeros], f"{value.name}/quantized", after, {},
                               dtype=ir.DataType.INT8 if self._scheme.signed else ir.DataType.UINT8)
        back = self.node("DequantizeLinear", [quantized.outputs[0], scales, zeros], f"{value.name}/dequantized",
                          quantized, {})
        for made in (quantized, back):
            made.outputs[0].shape = value.shape
        return back.outputs[0]

    def node(self, op_type: str, inputs: list[ir.Value], name: str, after: ir.Node | None, attributes: dict[str, Any],
             *, dtype: ir.DataType = ir.DataType.FLOAT, outputs: int = 1, domain: str = "") -> ir.Node:
        """Add a node, at the graph's beginning without `after`; its output has its name."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name, domain=domain)
        for number, output in enumerate(node.outputs):
            output.name, output.dtype = name if outputs == 1 else f"{name}/{number}", dtype
        graph = self._model.graph
        if after is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(after, node)
        return node

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer with the shape and dtype of `array`, weights or scales; one of this name is used again."""
        if name not in self._model.graph.initializers:
            self.register(name, ir.tensor(array, name=name), ir.Shape(list(array.shape)))
        return self._model.graph.initializers[name]

    def register(self, name: str, tensor: ir.TensorProtocol, shape: ir.Shape) -> None:
        """Add an initializer of `shape` and the tensor's dtype, weights; it may be computed when it is written.

        Args:
            name: of the initializer.
            tensor: of that shape; read when the graph is written.
            shape: equals the shape of `tensor`.
        """
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.register_initializer(value)


