"""Bundles of one matrix product that the checks of `make gpu` run: as an engine, and as an ONNX graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from exporters.tensorrt.engine_builder import build_engine
from exporters.tensorrt.engine_options import EngineOptions
from exporters.tensorrt.optimization_profiles import make_profiles
from runtimes.backends.onnxruntime_session import OrtSession
from runtimes.backends.session import Session, SessionOptions
from runtimes.backends.tensorrt.engine_session import TensorRtSession
from runtimes.system.device import Device
from tests.runtimes.engine_bundles import engine_details
from tests.runtimes.fakes import AFFINE, affine_bundle, affine_model, write_bundle

W = np.arange(12, dtype=np.float32).reshape(4, 3)
B = np.array([1, 2, 3], np.float32)


def affine_session(folder: Path, builder: str) -> TensorRtSession:
    """An engine built for the GPU of this machine."""
    graph = folder / "components/affine/model.onnx"
    graph.parent.mkdir(parents=True)
    onnx.save(affine_model(), graph)
    options = EngineOptions(builder=builder, capabilities=("current",) if builder == "tensorrt-rtx" else ())
    report = build_engine(graph, graph.with_name("engine.trt"), make_profiles(AFFINE.inputs, AFFINE.axes), options)
    part = dataclasses.replace(AFFINE, format="tensorrt", file="components/affine/engine.trt",
                               details=engine_details(**report.to_json(), gpu=""))
    return TensorRtSession(write_bundle(folder, {"affine": part}), "affine", SessionOptions(Device("cuda")))


def ort_session(folder: Path, device: str) -> Session:
    """The graph on one of ONNX Runtime's providers."""
    return OrtSession(affine_bundle(folder), "affine", SessionOptions(Device(device)))
