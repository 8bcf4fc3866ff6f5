"""Target-independent clean-up of a freshly exported graph: fold, simplify shapes, name everything stably.

Works on onnx_ir models; weights stay where they are (torch tensors, memory-mapped).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

_SCOPES = "pkg.torch.onnx.name_scopes"
Dimensions = Sequence[int | str]


def canonicalize(model: ir.Model) -> None:
    """Fold constants, simplify reshapes, drop what is unused, name nodes after modules, forget how it was traced.

    In place. Values keep their names where they had a meaning; local paths, stack traces and the exporter's symbols
    go, so equal modules give equal bytes.
    """
    fold_weight_transposes(model)
    optimizer.optimize_ir(model)
    simplify_reshapes(model)
    optimizer.optimize_ir(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )(model)
    name_nodes(model)
    rename_weights(model)
    forget(model)


def rename_dimensions(model: ir.Model, pairs: Iterable[tuple[ir.Shape | None, Dimensions]]) -> None:
    """Replace the exporter's symbols (s53) by the spec's names in the shapes of all values.

    Args:
        pairs: shape of a graph input as traced, and as it should read.
    """
    names = {}
    for traced, wanted in pairs:
        for old, new in zip(traced or (), wanted, strict=False):
            if isinstance(old, ir.SymbolicDim) and isinstance(new, str) and old.value:
                names[str(old.value)] = new
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None or symbols is None:
            return dim if isinstance(dim, int) else dim.value
        return symbols.sub(lambda match: names[match[0]], str(dim.value))

    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _dims(shape: Any, order: Sequence[int] | None = None) -> list[Any]:
    dims = list(shape)
    return dims if order is None else [dims[i] for i in order]


def fold_weight_transposes(model: ir.Model) -> None:
    """Store a weight as the MatMul reads it, instead of transposing at run time.

    The transposed weight is named KEY.T and computed when it is written, so that no copy is held.
    """
    graph = model.graph
    for node in [n for n in graph if n.op_type == "Transpose"]:
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is None or weight.name is None:
            continue
        order = node.attributes["perm"].as_ints()
        source, name = weight.const_value, f"{weight.name}.T"
        if name not in graph.initializers:
            graph.register_initializer(ir.Value(
                name=name, shape=ir.Shape(_dims(source.shape, order)), type=ir.TensorType(source.dtype),
                const_value=_transposed(source, order, name)))
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)


def _transposed(source: ir.TensorProtocol, order: Sequence[int], name: str) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(source.numpy().transpose(order)), name=name)

    return ir.LazyTensor(evaluate, source.dtype, ir.Shape(_dims(source.shape, order)), name=name)


def simplify_reshapes(model: ir.Model) -> None:
    """Replace computed targets of Reshape by constants: 0 copies a dimension, one -1 is inferred.

    The exporter computes every target from Shape, Slice and Concat; in a U-Net of 300 attention reshapes that was
    half of all nodes.
    """
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        data, target = node.inputs[0], node.inputs[1]
        if data is None or target is None or target.const_value is not None or data.shape is None:
            continue
        wanted = _target_dimensions(node)
        if wanted is None:
            continue
        constant = _as_constant(list(data.shape), wanted)
        if constant is None:
            continue
        name = "reshape_" + "_".join(str(d).replace("-", "m") for d in constant)
        if name not in model.graph.initializers:
            tensor = ir.tensor(np.array(constant, np.int64), name=name)
            model.graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(constant)]), type=ir.TensorType(tensor.dtype),
                                                      const_value=tensor))
        node.replace_input_with(1, model.graph.initializers[name])
        node.attributes.pop("allowzero", None)


def _target_dimensions(node: ir.Node) -> list[int | ir.SymbolicDim] | None:
    """What is known about the shape of a Reshape's output."""
    shape, target = node.outputs[0].shape, node.inputs[1]
    if shape is not None and all(isinstance(d, int) or d.value is not None for d in shape):
        return list(shape)
    maker = target.producer() if target is not None else None
    if maker is not None and maker.op_type == "Shape" and not maker.attributes and maker.inputs[0] is not None:
        original = maker.inputs[0].shape
        return list(original) if original is not None else None
    return None


def _as_constant(have: list[int | ir.SymbolicDim], want: list[int | ir.SymbolicDim]) -> list[int] | None:
    """Target of a Reshape without symbols, or None if two dimensions would have to be inferred."""
    result, inferred = [], 0
    for i, dim in enumerate(want):
        if isinstance(dim, int):
            result.append(dim)
        elif i < len(have) and not isinstance(have[i], int) and dim.value is not None and have[i] == dim:
            result.append(0)
        else:
            result.append(-1)
            inferred += 1
    return result if inferred <= 1 else None


def name_nodes(model: ir.Model) -> None:
    """Name each node by the module it comes from: `down_blocks.0.resnets.1.conv1/Conv`; repeats get a number."""
    seen: dict[str, int] = {}
    for node in model.graph:
        base = f"{_module_path(node)}/{node.op_type}"
        seen[base] = seen.get(base, 0) + 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"


def _module_path(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if not scopes:
        return ""
    path: Sequence[str] = ast.literal_eval(scopes)  # ['', 'model', 'model.conv_in', 'conv2d']
    return path[-2].removeprefix("model.") if len(path) > 1 else ""


def rename_weights(model: ir.Model) -> None:
    """Call weights as the source's files do: the wrapper's own attribute name goes."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")


def forget(model: ir.Model) -> None:
    """Drop stack traces, local paths, and shapes of inner values (they mention the exporter's symbols)."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.name = "main"
    interface = {*model.graph.inputs, *model.graph.outputs}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in interface:
                value.shape = value.type = None
