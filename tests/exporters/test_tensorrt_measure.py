"""The commands behind the figures in docs/tensorrt.md and docs/openvino.md."""

from __future__ import annotations

from importlib import util

import onnx
import pytest

from exporters.measure import openvino_speed, tensorrt_engines
from exporters.tensorrt.engine_builder import installed
from tests.exporters.test_onnx_precision import block


@pytest.fixture
def graph(tmp_path):
    onnx.save(block(), tmp_path / "block.onnx")
    return str(tmp_path / "block.onnx")


def test_engines_are_measured_per_precision_or_the_package_is_named(graph, capsys):
    code = tensorrt_engines.main([graph, "--axis", "batch=1:2:4", "--capabilities", "SM89"])
    out, err = capsys.readouterr()
    if not installed("tensorrt-rtx"):
        assert code == 4 and "tensorrt-rtx is not installed" in err
        return
    header, fp32, fp16 = out.splitlines()
    assert code == 0 and "engine MiB" in header
    assert fp32.split()[0] == "fp32" and float(fp32.split()[3]) == 1 and fp16.split()[0] == "fp16"
    assert fp16.split()[-1] == "SM89"


def test_an_axis_without_a_range_is_named(graph, capsys):
    assert tensorrt_engines.main([graph]) == 2
    assert "sample has the axis batch without a range (--axis batch=MIN:OPT:MAX)" in capsys.readouterr().err


def test_a_malformed_axis_is_named(graph, capsys):
    assert tensorrt_engines.main([graph, "--axis", "batch:2"]) == 2
    assert "'batch:2' is not NAME=MIN:OPT:MAX" in capsys.readouterr().err


def test_openvino_is_measured_beside_onnxruntime_or_the_package_is_named(graph, capsys):
    code = openvino_speed.main([graph, "--axis", "batch=2", "--calls", "3"])
    out, err = capsys.readouterr()
    if util.find_spec("openvino") is None:
        assert code == 4 and "openvino is not installed" in err
        return
    assert code == 0 and "relative L2 of out_sample" in out and "ratio" in out
