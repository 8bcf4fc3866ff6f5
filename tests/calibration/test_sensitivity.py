"""What single layers cost, the order in which they go back to float32, the halving search, where an error begins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.choice.layer_sensitivity import (
    Promotion,
    affordable,
    assignment_after,
    error_origins,
    fewest,
    promotions,
    relieve,
)
from calibration.choice.quantization_noise import LayerNoise, predict_noise
from calibration.graphs.layers import FLOAT, STATIC, WEIGHT, Layer, assign, find_layers
from calibration.graphs.qdq_placement import quantize, tensors_to_observe
from calibration.integers.ranges import Scheme, estimate
from calibration.trajectory.inner_tensors import compare, observe
from tests.calibration.graphs import CHANNELS, SIZE, calls, write_graph

SCHEME = Scheme(quantize_outputs=True)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """One weight of the middle convolution is so large that the rest of its channel is rounded to almost nothing."""
    file = write_graph(tmp_path / "model.onnx")
    model = onnx.load(file)
    weight = next(t for t in model.graph.initializer if t.name == "mid.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, 0, 0, 0] *= 300
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "mid.weight"))
    onnx.save(model, file)
    return file


def ranges_of(graph: Path) -> dict[str, tuple[float, float]]:
    model = ir.load(graph)
    tensors = tensors_to_observe(model, assign(find_layers(model), "static"), SCHEME)
    return estimate(observe(graph, tensors, calls, histograms=False), "minmax", SCHEME)


STARTED = {"conv_in/Conv": STATIC, "mid/Conv": STATIC, "to_q/MatMul": STATIC, "out/Gemm": STATIC}


def measured_alone(graph: Path, node: str, precision: str, folder: Path) -> float:
    """Relative L2 of the output with one layer below float32, by running that very graph."""
    alone = {layer.node: precision if layer.node == node else FLOAT for layer in find_layers(ir.load(graph))}
    quantize(graph, folder / "one.onnx", alone, ranges_of(graph), SCHEME)
    return compare(graph, folder / "one.onnx", lambda: calls(1))


def test_the_layer_with_an_outlier_is_the_most_sensitive_and_weights_alone_cost_less(graph):
    noise = predict_noise(graph, STARTED, ranges_of(graph), SCHEME, lambda: calls(2))
    assert max(noise, key=lambda node: noise[node].errors[WEIGHT]) == "mid/Conv"
    assert all(0 < n.errors[WEIGHT] <= 1.5 * n.errors[STATIC] for n in noise.values())


def test_what_is_predicted_is_what_each_layer_costs_when_it_is_measured_alone(graph, tmp_path):
    noise = predict_noise(graph, STARTED, ranges_of(graph), SCHEME, lambda: calls(1))
    for precision in (STATIC, WEIGHT):
        last = measured_alone(graph, "out/Gemm", precision, tmp_path)
        assert noise["out/Gemm"].errors[precision] == pytest.approx(last, rel=1e-3)
        for node in ("mid/Conv", "to_q/MatMul"):
            assert 0.3 < noise[node].errors[precision] / measured_alone(graph, node, precision, tmp_path) < 3


def test_only_what_is_below_float32_is_looked_at_and_work_counts_multiplications(graph):
    start = {**STARTED, "conv_in/Conv": FLOAT, "to_q/MatMul": WEIGHT}
    ranges = {name: ends for name, ends in ranges_of(graph).items() if name in ("c", "d", "g")}
    noise = predict_noise(graph, start, ranges, SCHEME, lambda: calls(1))
    assert [sorted(noise[node].errors) for node in start] == [[], ["w8", "w8a8"], ["w8"], ["w8", "w8a8"]]
    assert noise["conv_in/Conv"].macs == 2 * SIZE * SIZE * CHANNELS * 4 * 9


def test_tensors_without_a_type_that_put_shapes_together_are_not_taken_for_signals(tmp_path):
    """An optimized graph does not type every tensor; in Stable Diffusion XL's a Concat of sizes is among these."""
    node = onnx.helper.make_node
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = onnx.helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"], name="layer"), node("Shape", ["y"], ["rows"], end=1),
         node("Concat", ["rows", "four"], ["shape"], axis=0), node("Add", ["y", "x"], ["sum"]),
         node("Reshape", ["sum", "shape"], ["out"])], "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
        [weight, onnx.numpy_helper.from_array(np.array([4], np.int64), "four")])
    file = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), file)
    feeds = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
    noise = predict_noise(file, {"layer": WEIGHT}, {}, SCHEME, lambda: [feeds])
    assert math.isfinite(noise["layer"].errors[WEIGHT])


def test_the_fewest_layers_that_halve_the_error_leave_the_integers(graph):
    start = {**STARTED, "conv_in/Conv": FLOAT}
    relief = relieve(graph, start, ranges_of(graph), SCHEME, lambda: calls(2))
    assert "mid/Conv" not in relief.promoted  # nearly all of the work: beyond the limit
    before, after = relief.errors
    assert after < before
    assert set(relief.promoted) == {n for n in start if relief.assignment[n] != start[n]}


def test_the_first_layer_at_which_an_error_appears_is_named_first(graph, tmp_path):
    ranges = ranges_of(graph)
    quantize(graph, tmp_path / "q.onnx", assign(find_layers(ir.load(graph)), "static"), ranges, SCHEME)
    origins = error_origins(graph, tmp_path / "q.onnx", lambda: calls(2))
    assert origins[0].node == "mid/Conv"
    assert len(origins) == 4
    assert "mid/Conv (" in str(origins[0])


def layer(node: str, parameters: int) -> Layer:
    return Layer(node, "Conv", f"{node}.weight", 0, parameters, "x", "y")


LAYERS = [layer("small", 100), layer("large", 10_000), layer("exact", 5000)]
NOISE = {"small": LayerNoise({STATIC: 0.1, WEIGHT: 0.01}, 100), "exact": LayerNoise({STATIC: 0.0, WEIGHT: 0.0}, 5000),
         "large": LayerNoise({STATIC: 0.1, WEIGHT: 0.09}, 10_000)}
START = dict.fromkeys(NOISE, STATIC)


def test_the_most_error_for_the_least_cost_goes_first_and_nothing_goes_back_twice():
    path = promotions(LAYERS, NOISE, START)
    assert path[0].node == "small"
    for node in NOISE:
        assert [p.precision for p in path if p.node == node] in ([WEIGHT, FLOAT], [FLOAT])
    assert assignment_after(path, 0, START) == START
    assert assignment_after(path, len(path), START) == dict.fromkeys(NOISE, FLOAT)
    assert {p.node for p in promotions(LAYERS, NOISE, {**START, "large": FLOAT})} == {"small", "exact"}
    stored = promotions(LAYERS, NOISE, {**START, "large": WEIGHT})
    assert [p.precision for p in stored if p.node == "large"] == [FLOAT]


def test_relief_passes_over_what_costs_too_much_time_or_too_many_bytes():
    def step(node: str, precision: str, work: float, growth: float) -> Promotion:
        return Promotion(node, precision, 1.0, work, growth)

    path = [step("a", WEIGHT, 0.3, 0), step("b", WEIGHT, 0.1, 0), step("b", FLOAT, 0, 0.001),
            step("c", WEIGHT, 0.05, 0), step("a", FLOAT, 0, 0.03), step("c", FLOAT, 0, 0.01)]
    assert [(p.node, p.precision) for p in affordable(path)] == [("a", WEIGHT), ("c", WEIGHT), ("c", FLOAT)]


@pytest.mark.parametrize("threshold", [0, 1, 7, 63, 100])
def test_halving_finds_the_fewest_in_few_trials(threshold):
    asked = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count >= threshold

    assert fewest(100, holds) == threshold
    assert len(asked) <= 2 + math.ceil(math.log2(100))


def test_a_budget_that_cannot_be_met_is_reported_after_two_trials():
    asked = []

    def never(count: int) -> bool:
        asked.append(count)
        return False

    assert fewest(50, never) is None
    assert asked == [0, 50]


def test_an_error_is_infinite_where_the_candidate_is_not_finite():
    from calibration.trajectory.inner_tensors import relative_l2

    assert relative_l2(np.ones(3), np.array([1.0, np.nan, 1.0])) == math.inf
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0
