"""Q/DQ placement: sizes, accuracy, what is left alone, and that every target can read it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calibration.choice.layer_sensitivity import relieve
from calibration.graphs.layers import assign, check_patterns, find_layers, matching
from calibration.graphs.qdq_placement import quantize, tensors_to_observe
from calibration.integers.ranges import Scheme, estimate
from calibration.trajectory.inner_tensors import compare, observe
from deploy.core.doctor import sums_in_32_bits
from runtimes.backends.openvino_session import openvino_core
from runtimes.errors import InputError
from tests.calibration.graphs import calls, write_graph

# As builds for this CPU have it: without VNNI its sums of products have 16 bits, and 8-bit weights overflow them.
EXACT = sums_in_32_bits()
LIMIT = 127 if EXACT else 63
ORT, OPENVINO = Scheme(quantize_outputs=True, weight_limit=LIMIT), Scheme(give_biases=True, weight_limit=LIMIT)
TENSORRT = Scheme(signed=True, weight_limit=LIMIT)  # a GPU needs no limit; this CPU computes it here


def load(file: Path):
    import onnx_ir as ir

    return ir.load(file)


def quantized(source: Path, recipe: str, scheme: Scheme, keep: tuple[str, ...] = ()) -> Path:
    assignment = assign(find_layers(load(source)), recipe, keep)
    tensors = tensors_to_observe(load(source), assignment, scheme)
    seen = observe(source, tensors, calls, histograms=True)
    destination = source.with_name(f"{recipe}-{scheme.signed}-{scheme.quantize_outputs}.onnx")
    quantize(source, destination, assignment, estimate(seen, "mse", scheme), scheme)
    onnx.checker.check_model(str(destination), full_check=True)
    return destination


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("scheme", [ORT, OPENVINO, TENSORRT], ids=["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("recipe", ["hybrid", "static", "weight-only"])
def test_a_quantized_graph_is_small_and_close_to_the_original(graph, recipe, scheme):
    result = quantized(graph, recipe, scheme)
    assert result.stat().st_size < 0.45 * graph.stat().st_size  # a graph this small has names and biases to carry
    # on calls it was not calibrated on
    assert 0 < compare(graph, result, lambda: calls(4, seed=9)) < (0.06 if EXACT else 0.08)


def test_dynamic_quantizes_products_and_only_stores_convolutions(graph):
    result = quantized(graph, "dynamic", ORT)
    operators = Counter(node.op_type for node in onnx.load(result).graph.node)
    assert operators["MatMulInteger"] == 1
    assert operators["ConvInteger"] == 0
    assert operators["QuantizeLinear"] == 0
    assert compare(graph, result, lambda: calls(4, seed=9)) < 0.06


def test_onnxruntime_runs_static_convolutions_as_integers(graph, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(quantized(graph, "static", ORT)), options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["QLinearConv"] == 2
    assert operators["Conv"] == 0


def test_hybrid_leaves_the_first_convolution_alone_and_weights_are_stored_as_int8(graph):
    model = onnx.load(quantized(graph, "hybrid", Scheme(quantize_outputs=True)))
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["conv_in.weight"] == onnx.TensorProto.FLOAT
    assert kinds["mid.weight/int8"] == onnx.TensorProto.INT8
    assert "mid.weight" not in kinds
    assert next(t for t in model.graph.initializer if t.name == "mid.weight/int8/scale").dims == [64]


def test_tensorrt_gets_symmetric_signed_activations_with_zero_point_zero(graph):
    model = onnx.load(quantized(graph, "static", TENSORRT))
    zeros = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    arrays = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in zeros]
    assert arrays
    assert all(a.dtype == np.int8 and not a.any() for a in arrays)


def test_a_shared_input_is_quantized_once(tmp_path):
    graph = write_graph(tmp_path / "model.onnx")
    model = onnx.load(graph)
    model.graph.node.append(onnx.helper.make_node("MatMul", ["f", "to_q.weight"], ["k"], "to_k/MatMul"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("k", 1, ["n", 64]))
    onnx.save(model, graph)
    result = onnx.load(quantized(graph, "static", OPENVINO))
    assert sum(n.op_type == "QuantizeLinear" and n.input[0] == "f" for n in result.graph.node) == 1


@pytest.mark.parametrize("bias", ["none", "zeros"])
def test_openvino_runs_a_convolution_without_bias_that_a_sum_and_another_reader_share(graph, tmp_path, bias):
    model = onnx.load(graph)
    if bias == "none":
        next(n for n in model.graph.node if n.name == "mid/Conv").input.pop()
    else:
        value = next(t for t in model.graph.initializer if t.name == "mid.bias")
        value.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(value.dims), np.float32), value.name))
    position = next(i for i, n in enumerate(model.graph.node) if n.name == "rows/Reshape")
    model.graph.node[position].input[0] = "sum"
    for node in (onnx.helper.make_node("Add", ["d", "gate"], ["sum"], "sum/Add"),
                 onnx.helper.make_node("Sigmoid", ["d"], ["gate"], "gate/Sigmoid")):
        model.graph.node.insert(position, node)
    onnx.save(model, graph)
    pytest.importorskip("openvino")
    result = quantized(graph, "static", OPENVINO)
    compiled = openvino_core().compile_model(str(result), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = ort.InferenceSession(str(result), providers=["CPUExecutionProvider"])
    for feeds in calls(2, seed=3):
        by_graph, by_openvino = expected.run(None, feeds)[0], compiled(feeds)[0]
        assert np.linalg.norm(by_openvino - by_graph) < 0.03 * np.linalg.norm(by_graph)  # 0.8 without its bias


def test_an_exempt_layer_stays_float_and_the_pattern_may_be_an_op_type(graph):
    layers = find_layers(load(graph))
    assert assign(layers, "static", ["mid/*"])["mid/Conv"] == "float"
    assert matching(layers, ["Gemm"]) == ["out/Gemm"]


def test_a_pattern_that_fits_nothing_names_the_nearest():
    with pytest.raises(InputError, match="fits no layer") as error:
        check_patterns(["mid/Cov"], {"unet": ["mid/Conv", "Conv"]})
    assert "mid/Conv" in error.value.fix


def test_an_unknown_recipe_is_refused(graph):
    with pytest.raises(InputError, match="unknown quantization"):
        assign(find_layers(load(graph)), "magic")


@pytest.mark.parametrize(("recipe", "largest"), [("static", 63), ("weight-only", 127)])
def test_where_products_are_summed_in_16_bits_weights_have_7_and_stored_ones_8(graph, tmp_path, recipe, largest):
    scheme = Scheme(weight_limit=63)
    model = onnx.load(quantized(graph, recipe, scheme))
    arrays = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith((".weight/int7",
                                                                                                 ".weight/int8"))]
    assert len(arrays) == len(find_layers(load(graph)))
    assert max(int(np.abs(a).max()) for a in arrays) == largest


def test_equal_calibration_gives_equal_bytes(graph):
    first = quantized(graph, "hybrid", ORT).read_bytes()
    assert quantized(graph, "hybrid", ORT).read_bytes() == first


def test_weights_beside_the_graph_are_read_also_where_their_file_has_several_links(graph, tmp_path):
    (tmp_path / "beside").mkdir()
    apart = tmp_path / "beside" / "model.onnx"
    onnx.save(onnx.load(graph), apart, save_as_external_data=True, location="model.onnx.data",
              size_threshold=1024)
    os.link(tmp_path / "beside" / "model.onnx.data", tmp_path / "other name")
    start = assign(find_layers(load(apart)), "hybrid")
    ranges = estimate(observe(apart, tensors_to_observe(load(apart), start, ORT), calls, histograms=True), "mse", ORT)
    relief = relieve(apart, start, ranges, ORT, lambda: calls(2))
    assert relief.errors[1] <= relief.errors[0]
    result = quantized(apart, "hybrid", ORT)
    assert result.read_bytes() == quantized(graph, "hybrid", ORT).read_bytes()
