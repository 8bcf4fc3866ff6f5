"""The changes before quantization keep what a graph computes; the one after it takes a bias off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from calibration.graphs.layers import WEIGHT, assign, find_layers
from calibration.graphs.qdq_placement import quantize
from calibration.graphs.transforms import channel_means, channels_of, prepare
from calibration.integers.ranges import Scheme
from calibration.trajectory.inner_tensors import compare, plain_session

A, B, OUT = 6, 4, 16


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A concatenation of parts that differ in range into a convolution; a normalization with an outlier channel."""
    random = np.random.default_rng(0)

    def constant(name: str, *shape: int, scale: float = 1.0) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) * scale).astype(np.float32), name)

    gain = numpy_helper.from_array(np.array([30.0, *[1.0] * (OUT - 1)], np.float32), "gain")
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], "skip/Concat", axis=1),
        helper.make_node("Conv", ["ab", "w", "bias"], ["c"], "shortcut/Conv"),
        helper.make_node("Transpose", ["c"], ["t"], "rows/Transpose", perm=[0, 2, 3, 1]),
        helper.make_node("LayerNormalization", ["t", "gain", "shift"], ["n"], "norm/LayerNormalization"),
        helper.make_node("MatMul", ["n", "q"], ["q_out"], "to_q/MatMul"),
        helper.make_node("MatMul", ["n", "k"], ["k_out"], "to_k/MatMul"),
    ]
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes, "skip", [info("a", 1, ["n", A, 5, 5]), info("b", 1, ["n", B, 5, 5])],
        [info("q_out", 1, ["n", 5, 5, 8]), info("k_out", 1, ["n", 5, 5, 8]), info("c", 1, ["n", OUT, 5, 5])],
        [constant("w", OUT, A + B, 1, 1), constant("bias", OUT), gain, constant("shift", OUT),
         constant("q", OUT, 8), constant("k", OUT, 8)])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def calls():
    random = np.random.default_rng(1)
    for _ in range(4):
        yield {"a": (random.standard_normal((2, A, 5, 5)) + 1).astype(np.float32),
               "b": (random.standard_normal((2, B, 5, 5)) * 20).astype(np.float32)}


@pytest.mark.parametrize("method", ["split-skips", "smoothquant"])
def test_a_change_before_quantization_is_exact(graph, method):
    changed = prepare(graph, [method], calls, graph.with_name("changed.onnx"))
    assert changed != graph
    onnx.checker.check_model(str(changed), full_check=True)
    assert compare(graph, changed, calls) < 1e-6


def test_each_part_of_a_skip_connection_becomes_a_convolution_of_its_own(graph):
    layers = find_layers(ir.load(prepare(graph, ["split-skips"], calls, graph.with_name("changed.onnx"))))
    convolutions = {layer.node: (layer.source, layer.parameters) for layer in layers if layer.op_type == "Conv"}
    assert convolutions == {"shortcut/Conv/part0": ("a", OUT * A), "shortcut/Conv/part1": ("b", OUT * B)}


def test_smoothquant_brings_the_channels_closer_together(graph):
    changed = prepare(graph, ["smoothquant"], calls, graph.with_name("changed.onnx"))
    before, after = (channels_of(file, {"n": -1}, calls)["n"].amax for file in (graph, changed))
    assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)


def test_a_graph_without_such_places_is_left_alone(graph, tmp_path):
    from tests.calibration.graphs import calls as others
    from tests.calibration.graphs import write_graph

    other = write_graph(tmp_path / "other.onnx")
    assert prepare(other, ["split-skips", "smoothquant"], others, tmp_path / "x.onnx") == other
    assert prepare(graph, [], calls, tmp_path / "x.onnx") == graph


def test_bias_correction_takes_the_mean_error_of_rounded_weights_away(graph):
    assignment = assign(find_layers(ir.load(graph)), "weight-only")
    assert assignment["shortcut/Conv"] == WEIGHT
    means = channel_means(graph, assignment, calls)
    errors = []
    for name, given in (("plain", None), ("corrected", means)):
        file = graph.with_name(f"{name}.onnx")
        quantize(graph, file, assignment, {}, Scheme(weight_limit=15), given)  # coarse, so that there is an error
        feeds = {key: np.concatenate([call[key] for call in calls()]) for key in ("a", "b")}
        expected, found = (plain_session(f, 1).run(["c"], feeds)[0] for f in (graph, file))
        errors.append(np.abs((found - expected).mean(axis=(0, 2, 3))).max())
    assert errors[1] < 0.05 * errors[0]
