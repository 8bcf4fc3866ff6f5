"""Target-independent clean-up of a freshly exported graph: fold, simplify shapes, name everything stably.

Works on onnx_ir models; weights stay where they are (torch tensors, memory-mapped).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from exporters.onnx import shape_arithmetic
from exporters.onnx.graph_edits import attribute, constant_of, derived_weight, made_by, number_repeated_names, replace

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack"  # what the exporter calls the place of arithmetic on sizes
Dimensions = Sequence[int | str]


def canonicalize(model: ir.Model) -> None:
    """Fold constants, simplify shapes, drop what is unused, name nodes after modules, forget how it was traced.

    In place. Weights keep the names of the source's files; local paths, stack traces and the exporter's symbols go,
    so equal modules give equal bytes.
    """
    fold_weight_transposes(model)
    optimizer.optimize_ir(model)
    read_concatenated_parts(model)
    shape_arithmetic.transpose_flat(model)
    shape_arithmetic.simplify_targets(model)
    optimizer.optimize_ir(model)
    clean(model)
    name_nodes(model)
    rename_weights(model)
    forget(model)


def clean(model: ir.Model) -> None:
    """Remove identities, repeated and unused nodes and repeated small constants; put the rest in order."""
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )(model)
    _merge_equal_integers(model)


def _merge_equal_integers(model: ir.Model) -> None:
    """Shapes and indices only: two equal weights stay two, since an adapter or a quantizer may change one."""
    seen: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > 64 or value.is_graph_output():
            continue
        first = seen.setdefault((tuple(tensor.shape), tensor.numpy().tobytes()), value)
        if first is not value and value.name:
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[value.name]


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


def fold_weight_transposes(model: ir.Model) -> None:
    """Store a weight as the MatMul reads it, named KEY.T, instead of transposing at run time."""
    for node in [n for n in model.graph if n.op_type == "Transpose"]:
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        order = attribute(node, "perm")
        shape: list[Any] = list(weight.const_value.shape)
        folded = derived_weight(model, f"{weight.name}.T", [weight], [shape[i] for i in order],
                                lambda array, order=order: array.transpose(order))
        replace(node.outputs[0], folded)
        model.graph.remove(node, safe=True)


def read_concatenated_parts(model: ir.Model) -> None:
    """Read a part that was just concatenated directly: the time embedding swaps its sine and cosine halves."""
    for node in [n for n in model.graph if n.op_type == "Slice"]:
        joined = made_by(node.inputs[0], "Concat")
        bounds = [constant_of(value) for value in node.inputs[1:5]]
        if joined is None or len(bounds) != 4 or any(b is None or b.size != 1 for b in bounds):
            continue
        start, end, axis, step = (int(b.item()) for b in bounds if b is not None)
        rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
        if step != 1 or rank == 0 or axis % rank != attribute(joined, "axis") % rank:
            continue
        position = 0
        for part in joined.inputs:
            size = part.shape[axis] if part is not None and part.shape is not None else None
            if not isinstance(size, int) or part is None:
                break
            last = part is joined.inputs[-1]
            if position == start and (position + size == end or (last and end > position + size)):
                replace(node.outputs[0], part)
                break
            position += size


def name_nodes(model: ir.Model) -> None:
    """Name each node by the module it comes from: `down_blocks.0.resnets.1.conv1/Conv`; repeats get a number."""
    for node in model.graph:
        node.name = f"{_module_path(node)}/{node.op_type}"
    number_repeated_names(model)


def _module_path(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    path: Sequence[str] = ast.literal_eval(scopes) if scopes else ()  # ['', 'model', 'model.conv_in', 'conv2d']
    if len(path) > 1 and not path[-2].startswith(_NO_MODULE):
        return path[-2].removeprefix("model.") or "main"
    return "main"


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
