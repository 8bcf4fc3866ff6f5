"""4-bit blocks in a graph: which operators get them in which form, what is computed, what falls back to 8 bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from calibration.graphs.layers import FLOAT, assign
from calibration.graphs.text_encoder_int4 import BlockForm, find_stored, quantize_int4
from calibration.integers.int4_blocks import from_int4, group_scales, to_int4
from calibration.integers.ranges import Scheme
from calibration.targets_and_recipes import INT4
from runtimes.errors import InputError

NBITS, DEQUANTIZE = BlockForm("MatMulNBits"), BlockForm()
WORDS, WIDTH = 4096, 64


def array(name: str, *shape: int) -> onnx.TensorProto:
    random = np.random.default_rng(sum(name.encode()))
    return onnx.numpy_helper.from_array((random.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32), name)


def write_graph(file: Path) -> Path:
    """ids (B,) -> embedding -> product -> two Gemm with a bias, the second scaled -> product of 45 inputs, all rows."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], "embedding/Gather"),
        helper.make_node("MatMul", ["a", "q.weight"], ["b"], "q/MatMul"),
        helper.make_node("MatMul", ["b", "q.weight"], ["c"], "tied/MatMul"),
        helper.make_node("Gemm", ["c", "fc.weight", "fc.bias"], ["d"], "fc/Gemm", transB=1),
        helper.make_node("Gemm", ["d", "scaled.weight", "scaled.bias"], ["e"], "scaled/Gemm", alpha=2.0),
        helper.make_node("MatMul", ["e", "odd.weight"], ["out"], "odd/MatMul"),
    ]
    graph = helper.make_graph(
        nodes, "text", [helper.make_tensor_value_info("ids", 7, ["batch"])],
        [helper.make_tensor_value_info("out", 1, ["batch", 8])],
        [array("table", WORDS, WIDTH), array("q.weight", WIDTH, WIDTH), array("fc.weight", 96, WIDTH),
         array("fc.bias", 96), array("scaled.weight", 96, 45), array("scaled.bias", 45), array("odd.weight", 45, 8)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


def quantized(tmp_path: Path, form: BlockForm, keep: tuple[str, ...] = ()) -> tuple[Path, Path, dict[str, str]]:
    import onnx_ir as ir

    source, file = write_graph(tmp_path / "source.onnx"), tmp_path / "model.onnx"
    assignment = assign(find_stored(ir.load(source), form), INT4, keep)
    report = quantize_int4(source, file, assignment, form, Scheme())
    onnx.checker.check_model(str(file))
    return source, file, dict(report.assignment)


def run(file: Path) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(0, WORDS, 17)})[0]


def expected(source: Path, assignment: dict[str, str], tmp_path: Path) -> np.ndarray:
    """The float graph with its 4-bit weights rounded by numpy."""
    model = onnx.load(source)
    turned = {"q.weight", "odd.weight", "scaled.weight"}
    by_weight = {n.input[1]: assignment[n.name] for n in model.graph.node}
    for tensor in model.graph.initializer:
        if by_weight.get(tensor.name) == "w4":
            values = onnx.numpy_helper.to_array(tensor)
            weight = values.T if tensor.name in turned else values
            scales = group_scales(weight)
            rounded = from_int4(to_int4(weight, scales), scales)
            rounded = np.ascontiguousarray(rounded.T if tensor.name in turned else rounded)
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
    onnx.save(model, tmp_path / "expected.onnx")
    return run(tmp_path / "expected.onnx")


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("form", [NBITS, DEQUANTIZE], ids=["nbits", "dequantize"])
def test_the_graph_computes_with_the_rounded_weights(tmp_path: Path, form: BlockForm):
    source, file, assignment = quantized(tmp_path, form)
    found, full, rounded = run(file), run(source), expected(source, assignment, tmp_path)
    lost = np.linalg.norm(found - full) / np.linalg.norm(full)
    assert 0.02 < lost < 0.3
    # What is left are embeddings in 8 bits, inputs in 8 bits, and weights that fell back to 8 bits.
    assert np.linalg.norm(found - rounded) / np.linalg.norm(full) < 0.03


def test_onnx_runtime_gets_its_own_product_with_the_bias_inside(tmp_path: Path):
    _, file, assignment = quantized(tmp_path, NBITS)
    assert operators(file)["MatMulNBits"] == 4
    assert operators(file)["MatMul"] == 0
    fc = next(n for n in onnx.load(file).graph.node if n.name == "fc/Gemm")
    assert list(fc.input[3:]) == ["", "", "fc.bias"]
    assert assignment == {"q/MatMul": "w4", "tied/MatMul": "w4", "fc/Gemm": "w4", "odd/MatMul": "w4",
                          "scaled/Gemm": "w8", "embedding/Gather": "w8"}


def test_standard_blocks_are_opset_21_and_rows_of_no_multiple_of_32_fall_back_to_8_bits(tmp_path: Path):
    _, file, assignment = quantized(tmp_path, DEQUANTIZE)
    model = onnx.load(file)
    assert model.opset_import[0].version == 21
    blocks = [n for n in model.graph.node if any(a.name == "block_size" for a in n.attribute)]
    assert len(blocks) == 3  # one of them for both readers of the tied weight
    assert {a.i for n in blocks for a in n.attribute if a.name == "axis"} == {0, 1}
    types = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer)
    assert types["INT4"] == 3
    assert assignment["scaled/Gemm"] == "w4"
    assert assignment["odd/MatMul"] == "w8"


@pytest.mark.parametrize("form", [NBITS, DEQUANTIZE], ids=["nbits", "dequantize"])
def test_no_table_and_no_weight_is_left_in_float32(tmp_path: Path, form: BlockForm):
    source, file, _ = quantized(tmp_path, form)
    sizes = {t.name: len(t.raw_data) for t in onnx.load(file).graph.initializer if t.data_type == 1}
    assert all("scale" in name or "bias" in name for name in sizes)
    assert file.stat().st_size < 0.32 * source.stat().st_size
    gathers = [n.input[0] for n in onnx.load(file).graph.node if n.op_type == "Gather"]
    assert gathers == ["table/int8", "table/int8/scale"]


def test_scales_for_tensorrt_are_positive_and_its_embeddings_stay(tmp_path: Path):
    _, file, assignment = quantized(tmp_path, BlockForm(positive=True, embeddings=False))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer
               if t.name.endswith("int4/scale")}
    assert len(tensors) == 3
    assert all((scale > 0).all() for scale in tensors.values())
    assert "embedding/Gather" not in assignment
    assert "table" in {t.name for t in onnx.load(file).graph.initializer}


def test_exempt_layers_and_embeddings_stay_float32(tmp_path: Path):
    _, file, assignment = quantized(tmp_path, NBITS, keep=("Gather", "fc/*"))
    assert [assignment[name] for name in ("embedding/Gather", "fc/Gemm")] == [FLOAT, FLOAT]
    assert {"table", "fc.weight"} <= {t.name for t in onnx.load(file).graph.initializer}


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="weight-only-5"):
        assign([], "weight-only-5")
