"""Rewrites for onnxruntime's CPU kernels: each takes a canonical graph and returns how many places it changed.

All of them keep the mathematics; none emits an operator that the CPU provider lacks (it has no GroupNorm, for one).
Which of them pay is decided in `exporters.onnx.optimize_graph`, by measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_edits import (
    MICROSOFT,
    attribute,
    constant_of,
    derived_weight,
    is_weight,
    made_by,
    new_node,
    only_user,
    operand_pair,
    other_input,
    put_before,
    replace,
    small_constant,
)

Arrays = np.ndarray[Any, Any]


def attention(model: ir.Model) -> int:
    """softmax(scale * Q K^T + mask) V with its transposes and reshapes -> com.microsoft.MultiHeadAttention."""
    changed = 0
    for softmax in [n for n in model.graph if n.op_type == "Softmax"]:
        found = _attention_around(softmax)
        if found is None:
            continue
        query, key, value, mask, heads, scale, last = found
        node = new_node("MultiHeadAttention", [query, key, value, None, None, mask], softmax,
                        {"num_heads": heads, "scale": scale}, domain=MICROSOFT)
        put_before(last, [node])
        replace(last.outputs[0], node.outputs[0])
        changed += 1
    return changed


Parts = tuple[ir.Value, ir.Value, ir.Value, ir.Value | None, int, float, ir.Node]


def _attention_around(softmax: ir.Node) -> Parts | None:
    """Q (B, L, HD), K, V (B, S, HD), mask, heads, scale, and the last node of an attention."""
    scores, mask = made_by(softmax.inputs[0], "MatMul"), None
    if scores is None and (masked := made_by(softmax.inputs[0], "Add")) is not None:
        scores = made_by(masked.inputs[0], "MatMul")
        mask = masked.inputs[1]
    scaled = made_by(scores.inputs[0], "Mul") if scores is not None else None
    context = only_user(softmax.outputs[0])
    if scores is None or scaled is None or context is None or context.op_type != "MatMul":
        return None
    scale = constant_of(scaled.inputs[1])
    query = _before_heads(scaled.inputs[0], (0, 2, 1, 3))
    key, value = _before_heads(scores.inputs[1], (0, 2, 3, 1)), _before_heads(context.inputs[1], (0, 2, 1, 3))
    turned = only_user(context.outputs[0])
    last = only_user(turned.outputs[0]) if turned is not None else None
    if scale is None or scale.size != 1 or query is None or key is None or value is None or last is None:
        return None
    if turned is None or turned.op_type != "Transpose" or attribute(turned, "perm") != (0, 2, 1, 3):
        return None
    if last.op_type != "Reshape" or not query[1] == key[1] == value[1]:
        return None
    return query[0], key[0], value[0], mask, query[1], float(scale.item()), last


def _before_heads(value: ir.Value | None, order: tuple[int, ...]) -> tuple[ir.Value, int] | None:
    """(B, L, HD) and H for a value that was split into heads and transposed."""
    turned = made_by(value, "Transpose")
    split = made_by(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or split is None or attribute(turned, "perm") != order or split.inputs[0] is None:
        return None
    target = constant_of(split.inputs[1])
    if target is None or target.size != 4 or target[0] != 0 or target[1] not in (0, -1):
        return None
    return split.inputs[0], int(target[2])


def self_attention(model: ir.Model) -> int:
    """MultiHeadAttention over three projections of one input -> com.microsoft.Attention with the weights joined."""
    changed = 0
    for node in [n for n in model.graph if n.op_type == "MultiHeadAttention"]:
        parts = [_linear(value) for value in node.inputs[:3]]
        if any(part is None for part in parts):
            continue
        sources, weights, biases = zip(*(part for part in parts if part is not None), strict=True)
        if len(set(sources)) > 1 or len({b is None for b in biases}) > 1:
            continue
        name = (weights[0].name or "").replace("q_proj", "qkv_proj").replace("to_q", "to_qkv")
        rows = weights[0].const_value.shape[0]
        widths = [w.const_value.shape[1] for w in weights]
        joined = derived_weight(model, name, weights, (rows, sum(widths)), lambda *a: np.concatenate(a, axis=1))
        if biases[0] is None:
            bias = small_constant(model, np.zeros(sum(widths), np.float32), f"zeros_{sum(widths)}")
        else:
            bias = derived_weight(model, name.removesuffix(".weight.T") + ".bias", biases, (sum(widths),),
                                  lambda *a: np.concatenate(a))
        mask = node.inputs[5] if len(node.inputs) > 5 else None
        fused = new_node("Attention", [sources[0], joined, bias, None, None, mask], node,
                         {"num_heads": attribute(node, "num_heads"), "scale": attribute(node, "scale")},
                         domain=MICROSOFT)
        put_before(node, [fused])
        replace(node.outputs[0], fused.outputs[0])
        changed += 1
    return changed


def _linear(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """x, weight and bias of x W + b."""
    bias = None
    if (add := made_by(value, "Add")) is not None:
        pair = operand_pair(add, lambda v: is_weight(v, 1))
        if pair is None:
            return None
        bias, value = pair
    product = made_by(value, "MatMul")
    if product is None or product.inputs[0] is None or not is_weight(product.inputs[1], 2):
        return None
    weight = product.inputs[1]
    return (product.inputs[0], weight, bias) if weight is not None else None


def skip_layer_norm(model: ir.Model) -> int:
    """LayerNormalization(x + bias + residual) -> com.microsoft.SkipLayerNormalization, which also gives the sum."""
    changed = 0
    for norm in [n for n in model.graph if n.op_type == "LayerNormalization"]:
        add = made_by(norm.inputs[0], "Add")
        if add is None or add.inputs[0] is None or add.inputs[1] is None or attribute(norm, "axis", -1) != -1:
            continue
        if any(v.is_initializer() for v in add.inputs if v is not None) or len(norm.inputs) < 3:
            continue
        value, skip, bias = add.inputs[0], add.inputs[1], None
        for branch, rest in ((value, skip), (skip, value)):
            if only_user(branch) is add and (biased := made_by(branch, "Add")) is not None:
                pair = operand_pair(biased, lambda v: is_weight(v, 1))
                if pair is not None and made_by(pair[1], "MatMul") is not None:
                    bias, value, skip = pair[0], pair[1], rest
                    break
        inputs = [value, skip, norm.inputs[1], norm.inputs[2], *([bias] if bias is not None else [])]
        fused = new_node("SkipLayerNormalization", inputs, norm, {"epsilon": attribute(norm, "epsilon", 1e-5)},
                         domain=MICROSOFT, outputs=4)
        put_before(add, [fused])
        replace(norm.outputs[0], fused.outputs[0])
        fused.outputs[1].name = fused.outputs[2].name = ""
        replace(add.outputs[0], fused.outputs[3])
        changed += 1
    return changed


def split_geglu(model: ir.Model) -> int:
    """Split(x W + b) and a * gelu(g) -> two products, the second with com.microsoft.BiasGelu."""
    changed = 0
    for split in [n for n in model.graph if n.op_type == "Split" and len(n.outputs) == 2]:
        linear = _linear(split.inputs[0])
        gelu = only_user(split.outputs[1])
        if linear is None or linear[2] is None or gelu is None or gelu.op_type != "Gelu":
            continue
        source, weight, bias = linear[0], linear[1], linear[2]
        if attribute(gelu, "approximate", "none") != "none":
            continue
        rows, half = _shape(weight)[0], _shape(weight)[1] // 2
        stem = (weight.name or "").removesuffix(".weight.T")
        halves = []
        for part, where in (("value", slice(0, half)), ("gate", slice(half, None))):
            w = derived_weight(model, f"{stem}.{part}.weight.T", [weight], (rows, half), lambda a, s=where: a[:, s])
            b = derived_weight(model, f"{stem}.{part}.bias", [bias], (half,), lambda a, s=where: a[s])
            halves.append((new_node("MatMul", [source, w], split), b))
        (first, first_bias), (second, second_bias) = halves
        add = new_node("Add", [first.outputs[0], first_bias], split)
        gate = new_node("BiasGelu", [second.outputs[0], second_bias], gelu, domain=MICROSOFT)
        put_before(split, [first, add, second, gate])
        replace(split.outputs[0], add.outputs[0])
        replace(gelu.outputs[0], gate.outputs[0])
        changed += 1
    return changed


def silu(model: ir.Model) -> int:
    """x * sigmoid(a x) -> com.microsoft.QuickGelu(alpha=a); a = 1 is SiLU."""
    changed = 0
    for sigmoid in [n for n in model.graph if n.op_type == "Sigmoid"]:
        product, source, alpha = only_user(sigmoid.outputs[0]), sigmoid.inputs[0], 1.0
        if product is None or product.op_type != "Mul" or source is None:
            continue
        if (scaled := made_by(source, "Mul")) is not None:
            pair = operand_pair(scaled, lambda v: (c := constant_of(v)) is not None and c.size == 1)
            if pair is not None and other_input(product, sigmoid.outputs[0]) is pair[1]:
                factor = constant_of(pair[0])
                alpha, source = float(factor.item()) if factor is not None else 1.0, pair[1]
        if other_input(product, sigmoid.outputs[0]) is not source:
            continue
        fused = new_node("QuickGelu", [source], product, {"alpha": alpha}, domain=MICROSOFT)
        put_before(product, [fused])
        replace(product.outputs[0], fused.outputs[0])
        changed += 1
    return changed


def channel_affine(model: ir.Model) -> int:
    """x * scale + bias per channel (the end of a group norm) -> BatchNormalization: one pass over x instead of two."""
    changed = 0
    for add in [n for n in model.graph if n.op_type == "Add"]:
        shift = operand_pair(add, _is_per_channel)
        product = made_by(shift[1], "Mul") if shift is not None else None
        factor = operand_pair(product, _is_per_channel) if product is not None else None
        if shift is None or product is None or factor is None or only_user(product.outputs[0]) is not add:
            continue
        restored = made_by(factor[1], "Reshape")  # only here is it certain that the channels are the second dimension
        if restored is None or made_by(restored.inputs[0], "InstanceNormalization") is None:
            continue
        channels = _shape(shift[0])[0]
        flat = [derived_weight(model, f"{v.name}.flat", [v], (channels,), np.ravel) for v in (factor[0], shift[0])]
        fused = new_node("BatchNormalization", [
            factor[1], *flat, small_constant(model, np.zeros(channels, np.float32), f"zeros_{channels}"),
            small_constant(model, np.ones(channels, np.float32), f"ones_{channels}")], add, {"epsilon": 0.0})
        put_before(add, [fused])
        replace(add.outputs[0], fused.outputs[0])
        changed += 1
    return changed


def _is_per_channel(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    shape = _shape(value)
    return len(shape) in (2, 3) and set(shape[1:]) == {1} and value.const_value.dtype == ir.DataType.FLOAT


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer."""
    return tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()


def join_time_projections(model: ir.Model) -> int:
    """Linear layers of one vector (the time embedding, once per residual block) -> one product and a Split."""
    groups: dict[ir.Value, list[tuple[ir.Node, ir.Value, ir.Value]]] = {}
    for node in model.graph:
        if node.op_type != "Gemm" or attribute(node, "transB") != 1 or len(node.inputs) != 3:
            continue
        source, weight, bias = node.inputs
        if source is not None and weight is not None and bias is not None and is_weight(weight, 2):
            groups.setdefault(source, []).append((node, weight, bias))
    joined = [(source, layers) for source, layers in groups.items() if len(layers) > 1]
    for source, layers in joined:
        _join(model, source, layers)
    return sum(len(layers) for _, layers in joined)


def _join(model: ir.Model, source: ir.Value, layers: list[tuple[ir.Node, ir.Value, ir.Value]]) -> None:
    """Replace linear layers of one source; the Unsqueeze that reads each of their outputs is done once as well."""
    nodes, weights, biases = [n for n, _, _ in layers], [w for _, w, _ in layers], [b for _, _, b in layers]
    sizes, name = [_shape(weight)[0] for weight in weights], f"{(weights[0].name or '').removesuffix('.weight')}.joined"
    weight = derived_weight(model, f"{name}.weight", weights, (sum(sizes), _shape(weights[0])[1]), _stack)
    bias = derived_weight(model, f"{name}.bias", biases, (sum(sizes),), _stack)
    chain = [new_node("Gemm", [source, weight, bias], nodes[0], {"transB": 1})]
    results = [node.outputs[0] for node in nodes]
    readers = [reader for result in results if (reader := only_user(result)) is not None]
    if len(readers) == len(nodes) and all(
        reader.op_type == "Unsqueeze" and reader.inputs[1] is readers[0].inputs[1] for reader in readers
    ):
        chain.append(new_node("Unsqueeze", [chain[0].outputs[0], readers[0].inputs[1]], readers[0]))
        results = [reader.outputs[0] for reader in readers]
    lengths = small_constant(model, np.array(sizes, np.int64), f"{name}.sizes")
    chain.append(new_node("Split", [chain[-1].outputs[0], lengths], nodes[0], {"axis": 1}, outputs=len(nodes)))
    put_before(nodes[0], chain)
    for result, part in zip(results, chain[-1].outputs, strict=True):
        replace(result, part)


def _stack(*arrays: Arrays) -> Arrays:
    return np.concatenate(arrays, axis=0)


FUSIONS: dict[str, Callable[[ir.Model], int]] = {
    "attention": attention,
    "self_attention": self_attention,
    "skip_layer_norm": skip_layer_norm,
    "split_geglu": split_geglu,
    "silu": silu,
    "channel_affine": channel_affine,
    "join_time_projections": join_time_projections,
}
