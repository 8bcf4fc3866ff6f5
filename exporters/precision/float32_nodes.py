"""Decides which nodes of a graph stay float32 when the rest goes to 16 bits, and why; rewrites nothing."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.precision.element_types import FLOAT, Signature, signature
from runtimes.errors import InputError

FP16_MAX, FP16_MIN_NORMAL = 65504.0, 2.0**-14
# 16 bits lose the most where numbers of very different size are summed or raised to a power. What a runtime does
# inside these operators differs (ONNX's stash_type, TensorRT's accumulators); float32 in and out does not.
NORMALIZATION = frozenset({"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
                           "LpNormalization", "MeanVarianceNormalization", "RMSNormalization"})
SOFTMAX = frozenset({"LogSoftmax", "Softmax"})
REDUCTION = frozenset({"CumSum", "GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
                       "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"})
POWERS = frozenset({"Exp", "Log", "Pow", "Reciprocal", "Sqrt"})
TRIGONOMETRIC = frozenset({"Cos", "Sin"})
MADE_BY_ATTRIBUTE = frozenset({"Bernoulli", "Constant", "ConstantOfShape", "EyeLike", "RandomNormal",
                               "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range"})
COMPARISON = frozenset({"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"})
PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
MOVES = frozenset({"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
                   "Transpose", "Unsqueeze"})
POINTWISE = frozenset({"Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Sub", "Where"})
QUANTIZED = frozenset({"DequantizeLinear", "QuantizeLinear"})
_FAMILIES = {"normalization": NORMALIZATION, "softmax": SOFTMAX, "reduction": REDUCTION, "power": POWERS,
             "trigonometric": TRIGONOMETRIC, "made from an attribute": MADE_BY_ATTRIBUTE, "comparison": COMPARISON}

Types = Mapping[ir.Value, ir.DataType]


def float32_nodes(model: ir.Model, low: ir.DataType, types: Types, keep: Sequence[str], keep_ends: bool,
               ) -> dict[ir.Node, str]:
    """The nodes that stay float32 with the reason of each; nodes without a float32 output are not mentioned.

    Args:
        model: float32 graph without functions.
        low: FLOAT16 or BFLOAT16.
        types: from `element_types`.
        keep: patterns (fnmatch) over names of nodes and of their weights.
        keep_ends: keep convolutions with no convolution before them, or none after (conv_in and conv_out).

    Raises:
        InputError: a pattern that fits nothing; names the nearest.
    """
    opsets = dict(model.opset_imports)
    wanted = _by_pattern(model.graph, keep)
    float32: dict[ir.Node, str] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if not is_float(node, types):
            continue
        reason = wanted.get(node) or _own_reason(node, model.graph, low, types, signature(node, opsets))
        if reason is not None:
            float32[node] = reason
    _keep_timestep_path(float32, types)
    if keep_ends:
        for node in _ends(model.graph):
            float32.setdefault(node, "first or last convolution")
    _keep_after_overflow(float32, types)
    _keep_between(model.graph, float32, types)
    return float32


def is_float(node: ir.Node, types: Types) -> bool:
    """Whether 16 bits could concern the node: a float32 output, or a quantizer's float32 input."""
    if any(types.get(v) == FLOAT for v in node.outputs):
        return True
    return node.op_type == "QuantizeLinear" and _first_type(node, types) == FLOAT


def _first_type(node: ir.Node, types: Types) -> ir.DataType | None:
    first = node.inputs[0] if node.inputs else None
    return types.get(first) if first is not None else None


def _own_reason(node: ir.Node, main: ir.Graph, low: ir.DataType, types: Types, found: Signature | None) -> str | None:
    """Why the node alone, without its neighbours, stays float32; None if it need not."""
    if node.graph is not main or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
        return "inside a branch or loop"
    if found is None:
        return f"not a standard operator ({node.domain})"
    for reason, operators in _FAMILIES.items():
        if node.op_type in operators:
            return reason
    if node.op_type == "Cast":
        source = _first_type(node, types)
        return None if source is not None and source.is_floating_point() else "cast from an integer"
    if not all(found.accepts(p, low) for p, v in zip(found.outputs, node.outputs, strict=False)
               if types.get(v) == FLOAT):
        return f"the standard has no {low.name.lower()} form at this opset"
    return constant_reason(node, low)


def constant_reason(node: ir.Node, low: ir.DataType) -> str | None:
    """Why the node's own constants do not survive float16; None if they do. Reads one tensor at a time."""
    if low != ir.DataType.FLOAT16:
        return None
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None or value.const_value.dtype != FLOAT:
            continue
        array = value.const_value.numpy()
        size = magnitude(array)
        if FP16_MAX < size < np.inf:
            return f"constant outside float16 (up to {size:.3g})"
        smallest = float(np.min(np.abs(array), where=array != 0, initial=np.inf)) if array.size <= 4096 else np.inf
        if node.op_type in QUANTIZED and index == 1 and smallest < FP16_MIN_NORMAL:
            return f"quantization scale below float16's normal range ({smallest:.3g})"
        if array.size == 1 and smallest < FP16_MIN_NORMAL:
            return f"constant below float16's normal range ({smallest:.3g})"
    return None


def magnitude(array: np.ndarray[Any, Any]) -> float:
    """Largest absolute value of weights of any shape and dtype; 0 if empty. Allocates nothing of the array's size."""
    return max(abs(float(array.max())), abs(float(array.min()))) if array.size else 0.0


def _by_pattern(graph: ir.Graph, keep: Sequence[str]) -> dict[ir.Node, str]:
    found: dict[ir.Node, str] = {}
    for pattern in keep:
        hits = [node for node in graph if any(fnmatch.fnmatchcase(name, pattern) for name in _names(node))]
        if not hits:
            near = difflib.get_close_matches(pattern, names_in(graph), n=3, cutoff=0.4)
            raise InputError(f"the pattern {pattern!r} fits no node, operator or weight", where="precision keep",
                             fix=f"close names: {', '.join(near)}" if near else "look at the graph's node names")
        found.update({node: f"asked for ({pattern})" for node in hits})
    return found


def _names(node: ir.Node) -> list[str]:
    weights = [v.name for v in node.inputs if v is not None and v.const_value is not None and v.name]
    return [*([node.name] if node.name else []), node.op_type, *weights]


def names_in(graph: ir.Graph) -> list[str]:
    """Everything that a pattern may name: nodes, their operators, their weights."""
    return sorted({name for node in graph for name in _names(node)})


def _producers(node: ir.Node, types: Types) -> Iterable[ir.Node]:
    """Nodes that compute the float32 inputs."""
    for value in node.inputs:
        if value is not None and types.get(value) == FLOAT and (producer := value.producer()) is not None:
            yield producer


def _keep_timestep_path(float32: dict[ir.Node, str], types: Types) -> None:
    """What feeds a sine: angles reach 1000 radians, of which float16 keeps a step of 0.5."""
    stack = [n for n in float32 if n.op_type in TRIGONOMETRIC]
    while stack:
        for producer in _producers(stack.pop(), types):
            if producer not in float32 and producer.op_type not in PRODUCTS:
                float32[producer] = "feeds a sine or cosine"
                stack.append(producer)


def _keep_after_overflow(float32: dict[ir.Node, str], types: Types) -> None:
    """Attention masks: -3.4e38 must not reach a 16-bit sum before the softmax that consumes it."""
    stack = [n for n, reason in float32.items() if reason.startswith("constant outside")]
    while stack:
        node = stack.pop()
        if node.op_type not in MOVES | POINTWISE:
            continue
        for value in node.outputs:
            for use in value.uses():
                if use.node not in float32 and use.node.op_type in MOVES | POINTWISE and is_float(use.node, types):
                    float32[use.node] = "carries a value outside float16"
                    stack.append(use.node)


def _keep_between(graph: ir.Graph, float32: dict[ir.Node, str], types: Types) -> None:
    """Element-wise nodes whose every neighbour stays float32: two casts fewer, and no rounding inside one formula."""
    changed = True
    while changed:
        changed = False
        for node in graph:
            if node in float32 or node.op_type not in MOVES | POINTWISE or not is_float(node, types):
                continue
            producers = list(_producers(node, types))
            consumers = [use.node for value in node.outputs for use in value.uses()]
            if producers and consumers and all(n in float32 for n in (*producers, *consumers)):
                float32[node] = "between nodes that are kept"
                changed = True


def _ends(graph: ir.Graph) -> list[ir.Node]:
    """Convolutions without a convolution before them, or without one after."""
    behind: dict[ir.Value, bool] = {}
    first, last = [], []
    nodes = list(graph)
    for node in nodes:
        after = any(behind.get(v, False) for v in node.inputs if v is not None)
        if node.op_type == "Conv" and not after:
            first.append(node)
        behind.update({v: after or node.op_type == "Conv" for v in node.outputs})
    ahead: dict[ir.Value, bool] = {}
    for node in reversed(nodes):
        before = any(ahead.get(v, False) for v in node.outputs)
        if node.op_type == "Conv" and not before:
            last.append(node)
        for value in node.inputs:
            if value is not None:
                ahead[value] = ahead.get(value, False) or before or node.op_type == "Conv"
    return [*first, *last]
