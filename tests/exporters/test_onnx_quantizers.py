"""Q/DQ pairs are counted where they sit, and an attention block that holds one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.onnx.quantizer_nodes import find_quantizers


def attention(path: Path, *quantized: str) -> Path:
    """q k -> scores -> Softmax -> times v, then a projection; the named tensors pass through Q and DQ."""
    nodes = []

    def through(name: str) -> str:
        if name not in quantized:
            return name
        nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_dq"]))
        return f"{name}_dq"

    def add(op: str, inputs: list[str], output: str) -> None:
        nodes.append(helper.make_node(op, [through(i) for i in inputs], [output], name=f"node_{output}"))

    add("MatMul", ["q", "k"], "scores")
    add("Mul", ["scores", "factor"], "scaled")
    add("Softmax", ["scaled"], "weights")
    add("MatMul", ["weights", "v"], "mixed")
    add("MatMul", ["mixed", "projection"], "y")
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in ("q", "k", "v")]
    constants = {"factor": np.float32(0.5), "projection": np.eye(4, dtype=np.float32), "scale": np.float32(0.1),
                 "zero": np.int8(0)}
    graph = helper.make_graph(nodes, "g", tensors, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
                              [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def test_a_float_graph_has_none(tmp_path: Path):
    found = find_quantizers(attention(tmp_path / "g.onnx"))
    assert (found.inputs, found.attentions, found.broken) == ({}, 1, ())


def test_quantizers_outside_an_attention_leave_it_whole(tmp_path: Path):
    found = find_quantizers(attention(tmp_path / "g.onnx", "mixed", "projection"))
    assert (found.inputs, found.attentions, found.broken) == ({"MatMul": 2}, 1, ())


@pytest.mark.parametrize("tensor", ["q", "k", "v", "scores", "scaled", "weights"])
def test_a_quantizer_inside_is_named_by_its_softmax(tmp_path: Path, tensor: str):
    found = find_quantizers(attention(tmp_path / "g.onnx", tensor))
    assert (found.attentions, found.broken) == (1, ("node_weights",))
