"""4-bit blocks: the error of the scales, the packing as ONNX Runtime unpacks it, rows of no multiple of a group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from safetensors.numpy import load_file

from calibration.integers import int4_blocks
from calibration.integers.int4_blocks import GROUP, from_int4, group_scales, pack_nbits, to_int4
from deploy.reference_models import WEIGHTS

ODD = [(7, 45), (5, 31), (3, 1), (4, 96)]


def weights(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def relative(weight: np.ndarray, scales: np.ndarray) -> float:
    rounded = from_int4(to_int4(weight, scales), scales)
    return float(np.linalg.norm(rounded - weight) / np.linalg.norm(weight))


def by_library(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed integers and (outputs, groups) scales of ONNX Runtime's own quantizer."""
    config = DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=True, bits=4)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
    return packed, scales.reshape(weight.shape[0], -1)


def run_nbits(packed: np.ndarray, scales: np.ndarray, inputs: int, outputs: int) -> np.ndarray:
    """The weight (outputs, inputs) as ONNX Runtime's product sees it."""
    node = helper.make_node("MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", K=inputs,
                            N=outputs, bits=4, block_size=GROUP)
    graph = helper.make_graph(
        [node], "nbits", [helper.make_tensor_value_info("x", 1, ["m", inputs])],
        [helper.make_tensor_value_info("y", 1, ["m", outputs])],
        [onnx.numpy_helper.from_array(packed, "packed"), onnx.numpy_helper.from_array(scales.reshape(-1), "scales")])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0].T


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
def test_onnx_runtime_unpacks_what_was_packed(outputs: int, inputs: int):
    weight = weights(outputs, inputs)
    scales = group_scales(weight)
    integers = to_int4(weight, scales)
    assert scales.shape == (outputs, -(-inputs // GROUP))
    seen = run_nbits(pack_nbits(integers), scales, inputs, outputs)
    np.testing.assert_allclose(seen, from_int4(integers, scales), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("outputs", "inputs"), ODD)
def test_the_packing_is_the_librarys_for_the_librarys_scales(outputs: int, inputs: int):
    weight = weights(outputs, inputs)
    packed, scales = by_library(weight)
    ours = pack_nbits(to_int4(weight, scales))
    assert ours.shape == packed.shape
    pairs = [np.stack([p & 15, p >> 4], axis=3).reshape(outputs, -1)[:, :inputs].astype(int) for p in (ours, packed)]
    difference = np.abs(pairs[0] - pairs[1])
    assert difference.max() <= 1  # a value halfway between two integers goes to either
    assert difference.mean() < 0.02


def test_least_squares_loses_less_than_the_library_and_the_largest_magnitude():
    state = load_file(WEIGHTS / "text_encoder" / "model.safetensors")
    ends = ("proj.weight", "fc1.weight", "fc2.weight")
    matrices = [tensor.astype(np.float32) for name, tensor in state.items() if name.endswith(ends)]
    assert len(matrices) == 18
    for weight in (*matrices, weights(64, 256)):
        absmax = np.abs(int4_blocks.grouped(weight)).max(axis=2) / 7
        ours = relative(weight, group_scales(weight))
        assert ours < 0.97 * relative(weight, by_library(weight)[1])
        assert ours < 0.88 * relative(weight, absmax)
        assert relative(weight, group_scales(weight, positive=True)) < 0.92 * relative(weight, absmax)


def test_no_value_is_further_off_than_half_a_step_or_its_clipping():
    weight = weights(16, 128)
    scales = group_scales(weight)
    step = np.repeat(np.abs(scales), GROUP, axis=1)
    distance = np.abs(from_int4(to_int4(weight, scales), scales) - weight)
    clipped = np.abs(weight) > 7 * step
    assert np.all(distance[~clipped] <= 0.5001 * step[~clipped])
    assert clipped.mean() < 0.1
    assert np.all(distance <= (8 / min(int4_blocks.RATIOS) - 7 + 0.5) * step)


def test_positive_scales_are_positive_and_others_need_not_be():
    weight = weights(16, 128)
    assert (group_scales(weight, positive=True) > 0).all()
    assert (group_scales(weight) < 0).any()


def test_groups_of_zeros_stay_zeros():
    weight = weights(4, 64)
    weight[1, :32] = 0
    scales = group_scales(weight)
    assert np.isfinite(scales).all()
    assert (scales != 0).all()
    assert not from_int4(to_int4(weight, scales), scales)[1, :32].any()


def test_a_weight_of_four_bits_with_exact_scales_is_stored_exactly():
    integers = np.random.default_rng(0).integers(-8, 8, (6, 64)).astype(np.int8)
    integers[:, ::GROUP] = -8
    weight = from_int4(integers, np.full((6, 2), 0.125, np.float32))
    scales = group_scales(weight)
    np.testing.assert_array_equal(from_int4(to_int4(weight, scales), scales), weight)


def test_working_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    weight = weights(50, 77)
    whole = group_scales(weight)
    integers = to_int4(weight, whole)
    np.save(tmp_path / "w.npy", weight.T)
    monkeypatch.setattr(int4_blocks, "CHUNK_VALUES", 200)
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r").T
    np.testing.assert_array_equal(group_scales(mapped), whole)
    np.testing.assert_array_equal(to_int4(mapped, whole), integers)
