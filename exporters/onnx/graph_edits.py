"""Small queries and edits of onnx_ir graphs that the rewrites of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None if there are several, or if it is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """A small initializer as an array of its own shape and dtype, any values; None of any other value.

    Above 8192 elements it is None too: a weight matrix is never read.
    """
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor.numpy() if tensor is not None and tensor.size <= 8192 else None


def is_weight(value: ir.Value | None, rank: int) -> bool:
    """True for a floating-point initializer of that rank."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    return len(value.const_value.shape) == rank and value.const_value.dtype.is_floating_point()


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The second operand of a node with two."""
    first, second = node.inputs[0], node.inputs[1]
    return second if first is value else first


def operand_pair(node: ir.Node, accept: Callable[[ir.Value | None], bool]) -> tuple[ir.Value, ir.Value] | None:
    """Of a commutative node: the operand that is accepted, and the other one."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return None
    if accept(second):
        return second, first
    return (first, second) if accept(first) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute; sequences as tuples."""
    if name not in node.attributes:
        return default
    value = node.attributes[name].value
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], like: ir.Node, attributes: dict[str, Any] | None = None,
    *, domain: str = "", outputs: int = 1,
) -> ir.Node:
    """A node that counts as part of the same module as `like`."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    node.metadata_props.update(like.metadata_props)
    node.name = f"{(like.name or '').rpartition('/')[0]}/{op_type}"
    return node


def put_before(place: ir.Node, nodes: Iterable[ir.Node]) -> None:
    """Insert nodes in front of another."""
    graph = place.graph
    if isinstance(graph, ir.Graph):
        graph.insert_before(place, list(nodes))


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of a value, the graph's outputs included, read another."""
    if old.is_graph_output():
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def small_constant(model: ir.Model, array: np.ndarray[Any, Any], name: str) -> ir.Value:
    """An initializer that holds `array`: any shape, any dtype, any values; one of that name is used again."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def derived_weight(
    model: ir.Model, name: str, sources: Sequence[ir.Value], shape: Sequence[int],
    make: Callable[..., np.ndarray[Any, Any]],
) -> ir.Value:
    """An initializer computed from others when it is written, so that no copy is held meanwhile.

    Args:
        model: gets the initializer, or has it already under this name.
        name: of the initializer.
        sources: initializers, weights of any shape; their arrays are the arguments of `make`.
        shape: of the result, which has the dtype of the first source.
        make: arrays of the sources -> the result.
    """
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensors = [source.const_value for source in sources if source.const_value is not None]
    dtype, final = tensors[0].dtype, ir.Shape(list(shape))

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make(*(t.numpy() for t in tensors))), name=name)

    lazy = ir.LazyTensor(evaluate, dtype, final, name=name)
    value = ir.Value(name=name, shape=final, type=ir.TensorType(dtype), const_value=lazy)
    model.graph.register_initializer(value)
    return value


def number_repeated_names(model: ir.Model) -> None:
    """Make node names unique: the second MatMul of a module is MODULE/MatMul_2."""
    taken, seen = set(), dict[str, int]()
    for node in model.graph:
        base = name = node.name or f"main/{node.op_type}"
        while name in taken:
            seen[base] = seen.get(base, 1) + 1
            name = f"{base}_{seen[base]}"
        taken.add(name)
        node.name = name
