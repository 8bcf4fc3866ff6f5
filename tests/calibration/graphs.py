"""A small float32 graph with one layer of each kind, and inputs for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

CHANNELS, SIZE = 16, 8


def write_graph(file: Path, seed: int = 0) -> Path:
    """sample (B, 4, 8, 8) -> conv_in -> SiLU -> mid conv -> rows -> product -> gemm -> (B * 64, 8), plus `timestep`."""
    random = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        return onnx.numpy_helper.from_array((random.standard_normal(shape) / fan**0.5).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["sample", "conv_in.weight", "conv_in.bias"], ["a"], "conv_in/Conv", pads=[1] * 4),
        helper.make_node("Sigmoid", ["a"], ["b"], "act/Sigmoid"),
        helper.make_node("Mul", ["a", "b"], ["c"], "act/Mul"),
        helper.make_node("Conv", ["c", "mid.weight", "mid.bias"], ["d"], "mid/Conv", pads=[1] * 4),
        helper.make_node("Reshape", ["d", "rows"], ["e"], "rows/Reshape"),
        helper.make_node("Add", ["e", "timestep"], ["f"], "time/Add"),
        helper.make_node("MatMul", ["f", "to_q.weight"], ["g"], "to_q/MatMul"),
        helper.make_node("Gemm", ["g", "out.weight", "out.bias"], ["out_sample"], "out/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("sample", 1, ["batch", 4, SIZE, SIZE]),
         helper.make_tensor_value_info("timestep", 1, [1])],
        [helper.make_tensor_value_info("out_sample", 1, ["n", 8])],
        [weight("conv_in.weight", CHANNELS, 4, 3, 3), weight("conv_in.bias", CHANNELS),
         weight("mid.weight", 4 * CHANNELS, CHANNELS, 3, 3), weight("mid.bias", 4 * CHANNELS),
         onnx.numpy_helper.from_array(np.array([-1, 4 * CHANNELS], np.int64), "rows"),
         weight("to_q.weight", 4 * CHANNELS, 4 * CHANNELS), weight("out.weight", 8, 4 * CHANNELS),
         weight("out.bias", 8)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


def calls(count: int = 6, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Inputs whose spread grows with the timestep."""
    random = np.random.default_rng(seed)
    for number in range(count):
        timestep = (number + 0.5) * 1000 / count
        sample = random.standard_normal((2, 4, SIZE, SIZE)).astype(np.float32) * np.float32(1 + timestep / 1000)
        yield {"sample": sample, "timestep": np.array([timestep / 1000], np.float32)}
