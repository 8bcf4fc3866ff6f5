"""OpenVINO's files: the same numbers as the graph they were made of, in both precisions of storage."""

from __future__ import annotations

from importlib import util

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporters.openvino.openvino_files import convert_openvino
from exporters.precision.sixteen_bits import convert_precision
from runtimes.backends.openvino_session import new_core
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import DeployError, InputError, UnavailableError
from tests.exporters.exporting import relative_l2
from tests.exporters.test_onnx_precision import block, feeds, run
from tests.runtimes.fakes import graph

INSTALLED = util.find_spec("openvino") is not None
INPUTS = (TensorSpec("sample", "float32", ("batch", 4, 8, 8)), TensorSpec("timestep", "float32", ("batch", 1)))
OUTPUTS = (TensorSpec("out_sample", "float32", ("batch", 4, 8, 8)),)
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="the first test says what is missing")


def evaluate(file, values):
    compiled = new_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled(values).values()))


def test_without_openvino_its_package_is_named(tmp_path):
    onnx.save(block(), tmp_path / "block.onnx")
    if INSTALLED:
        assert convert_openvino(tmp_path / "block.onnx", tmp_path / "o" / "m.xml", INPUTS, OUTPUTS).version
        return
    with pytest.raises(UnavailableError, match=r"openvino is not installed .*ldm-deploy\[openvino\]"):
        convert_openvino(tmp_path / "block.onnx", tmp_path / "o" / "m.xml", INPUTS, OUTPUTS)


@needs_openvino
def test_the_converted_graph_computes_the_same(tmp_path):
    onnx.save(block(), tmp_path / "block.onnx")
    report = convert_openvino(tmp_path / "block.onnx", tmp_path / "o" / "model.xml", INPUTS, OUTPUTS)
    assert report.operations["Convolution"] == 2
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["model.bin", "model.xml"]
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "o").iterdir())
    for batch in (1, 3):
        expected = run(tmp_path / "block.onnx", feeds(batch))
        assert relative_l2(evaluate(tmp_path / "o" / "model.xml", feeds(batch)), expected) < 1e-5


@needs_openvino
def test_weights_stored_in_float16_stay_so_on_disk_and_are_computed_with_in_float32(tmp_path):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = graph([("x", TensorProto.FLOAT, ["n", 64])], [("y", TensorProto.FLOAT, ["n", 64])],
                  [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight})
    onnx.save(model, tmp_path / "x.onnx")
    convert_precision(tmp_path / "x.onnx", tmp_path / "y.onnx", "fp16", mode="storage")
    specs = (TensorSpec("x", "float32", ("n", 64)),), (TensorSpec("y", "float32", ("n", 64)),)
    convert_openvino(tmp_path / "y.onnx", tmp_path / "m.xml", *specs)
    assert (tmp_path / "m.bin").stat().st_size < 64 * 64 * 2 + 100
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = x @ weight.astype(np.float16).astype(np.float32)
    assert relative_l2(evaluate(tmp_path / "m.xml", {"x": x}), expected) < 1e-5


@needs_openvino
def test_an_operator_that_openvino_does_not_know_is_named_and_nothing_is_left(tmp_path):
    model = graph([("x", TensorProto.FLOAT, ["n", 2, 2])], [("y", TensorProto.FLOAT, ["n"])],
                  [helper.make_node("Det", ["x"], ["y"], name="det")])
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"OpenVINO cannot read the graph.*Det"):
        convert_openvino(tmp_path / "x.onnx", tmp_path / "o" / "m.xml", (TensorSpec("x", "float32", ("n", 2, 2)),),
                         (TensorSpec("y", "float32", ("n",)),))
    assert not (tmp_path / "o").exists()


@needs_openvino
def test_a_name_that_is_lost_is_a_bug_of_ours_and_said(tmp_path):
    onnx.save(block(), tmp_path / "block.onnx")
    with pytest.raises(DeployError, match="has no latents, only"):
        convert_openvino(tmp_path / "block.onnx", tmp_path / "m.xml", (TensorSpec("latents", "float32", ()),), OUTPUTS)
