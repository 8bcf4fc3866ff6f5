"""Engines: real ones where a builder is installed; everything around the builder with a stand-in for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from exporters.precision.sixteen_bits import convert_precision
from exporters.tensorrt.engine_builder import build_engine, installed
from exporters.tensorrt.engine_options import EngineOptions
from exporters.tensorrt.optimization_profiles import make_profiles
from runtimes.bundle.folder import sha256_of
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import BundleError, DeployError, InputError, UnavailableError
from tests.exporters.test_onnx_precision import block
from tests.runtimes.fakes import graph

INPUTS = (TensorSpec("sample", "float32", ("batch", 4, 8, 8)), TensorSpec("timestep", "float32", ("batch", 1)))
AXES = {"batch": Axis("images", ShapeRange(1, 2, 4))}
PROFILES = make_profiles(INPUTS, AXES)
RTX = EngineOptions(builder="tensorrt-rtx")


@pytest.fixture
def source(tmp_path) -> Path:
    onnx.save(block(), tmp_path / "block.onnx")
    return tmp_path / "block.onnx"


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


# ---- the real builder, ahead of time, without a GPU ----------------------------------------------------------------


def test_without_the_builder_its_package_is_named(source, tmp_path):
    if installed("tensorrt-rtx"):
        assert build_engine(source, tmp_path / "out" / "unet.trt", PROFILES, RTX).version
        return
    with pytest.raises(UnavailableError, match=r"tensorrt-rtx is not installed .*ldm-deploy\[tensorrt-rtx\]"):
        build_engine(source, tmp_path / "out" / "unet.trt", PROFILES, RTX)
    assert left_in(tmp_path / "out") == []


needs_rtx = pytest.mark.skipif(not installed("tensorrt-rtx"), reason="the first test says what is missing")


@needs_rtx
def test_an_engine_is_real_and_says_what_it_is(source, tmp_path):
    convert_precision(source, tmp_path / "low.onnx", "fp16")
    report = build_engine(tmp_path / "low.onnx", tmp_path / "out" / "unet.trt", PROFILES, RTX)
    content = (tmp_path / "out" / "unet.trt").read_bytes()
    assert content[:4] == b"vtrt" and len(content) == report.engine_bytes > 10_000
    assert report.capabilities == ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
    assert report.refused_capabilities == {}
    assert report.layers["HALF"] > 5 and report.layers["FLOAT"] > 0
    assert report.graph_sha256 == sha256_of(tmp_path / "low.onnx")
    assert report.seconds > 0 and report.peak_rss_bytes > 50e6
    assert left_in(tmp_path / "out") == ["unet.trt"]


@needs_rtx
def test_a_capability_that_cannot_run_the_graph_is_left_out_and_said(source, tmp_path):
    report = build_engine(source, tmp_path / "unet.trt", PROFILES, RTX)
    assert "SM75" not in report.capabilities and "SM89" in report.capabilities
    assert "FP32 GEMM is not supported" in report.refused_capabilities["SM75"]


@needs_rtx
def test_a_capability_asked_for_by_name_is_never_left_out(source, tmp_path):
    with pytest.raises(InputError, match=r"refuses this graph for a GPU asked for.*SM75.*precision fp16"):
        build_engine(source, tmp_path / "unet.trt", PROFILES, EngineOptions(capabilities=("SM75", "SM89")))
    assert not (tmp_path / "unet.trt").exists()


@needs_rtx
def test_a_capability_that_does_not_exist_is_refused_with_the_ones_that_do(source, tmp_path):
    with pytest.raises(InputError, match=r"no compute capability SM42; this builder offers SM75, SM80"):
        build_engine(source, tmp_path / "unet.trt", PROFILES, EngineOptions(capabilities=("SM42",)))


@needs_rtx
def test_an_operator_without_a_tensorrt_form_is_named(tmp_path):
    model = graph([("x", TensorProto.FLOAT, ["n", 2, 2])], [("y", TensorProto.FLOAT, ["n"])],
                  [helper.make_node("Abs", ["x"], ["a"], name="abs"),
                   helper.make_node("Det", ["a"], ["y"], name="det")])
    onnx.save(model, tmp_path / "x.onnx")
    profiles = make_profiles((TensorSpec("x", "float32", ("n", 2, 2)),), {"n": Axis("rows", ShapeRange(1, 1, 2))})
    with pytest.raises(InputError, match=r"cannot compile node 1, Det 'det' \(the operator has no TensorRT form"):
        build_engine(tmp_path / "x.onnx", tmp_path / "x.trt", profiles, RTX)


# ---- around the builder ----------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A module `tensorrt` that every new process finds first."""
    folder = tmp_path / "modules"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("fake_tensorrt.py"), folder / "tensorrt.py")
    monkeypatch.syspath_prepend(folder)
    return folder


GPU = EngineOptions(builder="tensorrt")


@pytest.mark.parametrize(("mode", "kind", "message"), [
    ("kill", UnavailableError, r"ended by SIGKILL: it said nothing \(memory ran out, most likely: build with --prec"),
    ("crash", UnavailableError, r"ended by SIGABRT: assertion failed in kernel_gen.cpp"),
    ("exit", DeployError, r"ended with code 3: something went wrong"),
    ("driver", UnavailableError, r"no usable NVIDIA driver.*--target tensorrt-rtx"),
    ("memory", UnavailableError, r"ran out of memory.*smaller --shapes"),
    ("layer", InputError, r"refuses the graph: Could not find any implementation for node conv_in"),
    ("refuse", InputError, r"cannot compile node 7, Det 'decoder/det'"),
    ("cut", BundleError, "not a TensorRT engine"),
])
def test_every_failure_is_named_and_leaves_nothing(fake, source, tmp_path, monkeypatch, mode, kind, message):
    monkeypatch.setenv("FAKE_TENSORRT", mode)
    with pytest.raises(kind, match=message):
        build_engine(source, tmp_path / "out" / "unet.trt", PROFILES, GPU)
    assert left_in(tmp_path / "out") == []


def test_a_full_disk_is_named_and_leaves_nothing(fake, source, tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr("exporters.tensorrt.engine_builder.PARTIAL", "/dev/full")
    with pytest.raises(UnavailableError, match="the disk is full"):
        build_engine(source, tmp_path / "out" / "unet.trt", PROFILES, GPU)
    assert left_in(tmp_path / "out") == []


def test_a_failed_build_leaves_the_engine_that_was_there(fake, source, tmp_path, monkeypatch):
    (tmp_path / "unet.trt").write_bytes(b"before")
    monkeypatch.setenv("FAKE_TENSORRT", "kill")
    with pytest.raises(UnavailableError):
        build_engine(source, tmp_path / "unet.trt", PROFILES, GPU)
    assert (tmp_path / "unet.trt").read_bytes() == b"before"


def test_the_timing_cache_grows_from_build_to_build(fake, source, tmp_path):
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        report = build_engine(source, tmp_path / "unet.trt", PROFILES, GPU, timing_cache=cache)
    assert cache.read_bytes() == b"timed;timed;"
    assert (report.version, report.capabilities, report.layers) == ("11.4.0", (), {"FLOAT": 3})


def test_an_option_that_this_release_lacks_is_named(fake, source, tmp_path):
    with pytest.raises(InputError, match="this builder has no SPARSE_WEIGHTS"):
        build_engine(source, tmp_path / "unet.trt", PROFILES, EngineOptions(builder="tensorrt", sparse_weights=True))


def test_a_package_whose_libraries_are_missing_is_named(fake, source, tmp_path):
    (fake / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(UnavailableError, match=r"does not load: libnvinfer.so.11"):
        build_engine(source, tmp_path / "unet.trt", PROFILES, GPU)
