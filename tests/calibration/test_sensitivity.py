"""Errors of single layers, the order in which they go back to float32, the halving search, where an error begins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.layers import FLOAT, STATIC, WEIGHT, Layer, assign, find_layers
from calibration.observe import compare, observe
from calibration.quantize import quantize, tensors_to_observe
from calibration.ranges import Scheme, estimate
from calibration.sensitivity import assignment_after, error_origins, fewest, layer_errors, promotions
from tests.calibration.graphs import calls, write_graph

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


def test_the_layer_with_an_outlier_is_the_most_sensitive_and_weights_alone_cost_less(graph):
    errors = layer_errors(graph, ranges_of(graph), SCHEME, lambda: calls(2))
    assert max(errors, key=lambda node: errors[node][WEIGHT]) == "mid/Conv"
    assert all(0 < e[WEIGHT] <= 1.5 * e[STATIC] for e in errors.values())


def test_one_layers_error_is_that_of_the_graph_with_this_layer_quantized(graph, tmp_path):
    ranges = ranges_of(graph)
    errors = layer_errors(graph, ranges, SCHEME, lambda: calls(1))
    alone = {layer.node: WEIGHT if layer.node == "to_q/MatMul" else FLOAT for layer in find_layers(ir.load(graph))}
    quantize(graph, tmp_path / "one.onnx", alone, ranges, SCHEME)
    error = compare(graph, tmp_path / "one.onnx", lambda: calls(1))
    assert error == pytest.approx(errors["to_q/MatMul"][WEIGHT], rel=1e-3)


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
ERRORS = {"small": {STATIC: 0.1, WEIGHT: 0.01}, "large": {STATIC: 0.1, WEIGHT: 0.09},
          "exact": {STATIC: 0.0, WEIGHT: 0.0}}


def test_the_most_error_for_the_least_cost_goes_first_and_nothing_goes_back_twice():
    path = promotions(LAYERS, ERRORS)
    assert (path[0].node, path[0].precision) == ("small", WEIGHT)
    for node in ("small", "large", "exact"):
        steps = [p.precision for p in path if p.node == node]
        assert steps in ([WEIGHT, FLOAT], [FLOAT])
    assert assignment_after(LAYERS, path, 0) == dict.fromkeys(ERRORS, STATIC)
    assert assignment_after(LAYERS, path, len(path)) == dict.fromkeys(ERRORS, FLOAT)
    assert assignment_after(LAYERS, path, 0, ["large"])["large"] == FLOAT


@pytest.mark.parametrize("threshold", [0, 1, 7, 63, 100])
def test_halving_finds_the_fewest_in_few_trials(threshold):
    asked = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count >= threshold

    assert fewest(100, holds) == threshold
    assert len(asked) <= 2 + math.ceil(math.log2(100))


def test_a_budget_that_cannot_be_met_is_told_after_two_trials():
    asked = []

    def never(count: int) -> bool:
        asked.append(count)
        return False

    assert fewest(50, never) is None
    assert asked == [0, 50]


def test_an_error_is_infinite_where_the_candidate_is_not_finite():
    from calibration.observe import relative_l2

    assert relative_l2(np.ones(3), np.array([1.0, np.nan, 1.0])) == math.inf
    assert relative_l2(np.zeros(3), np.zeros(3)) == 0
