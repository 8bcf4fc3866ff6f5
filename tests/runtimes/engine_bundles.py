"""Bundles of one engine for the tests of TensorRT sessions, and what they share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx

from runtimes.backends.session import SessionOptions
from runtimes.backends.tensorrt import engine_session
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import from_json
from runtimes.system.device import Device
from tests.runtimes.fakes import AFFINE, affine_model, write_bundle

OPTIONS = SessionOptions(Device("cuda"))
PROFILES = [{"x": [[1, 4], [1, 4], [2, 4]]}, {"x": [[2, 4], [8, 4], [8, 4]]}]
LIMITS = [(1, 2), (2, 8)]


def engine_details(**changes: Any) -> EngineDetails:
    """Those of the fakes' engine, as JSON has them, with changes."""
    facts = {"builder": "tensorrt", "builder_version": "11.4.0", "compute_capabilities": [], "refused_capabilities": {},
             "gpu": "NVIDIA Fake, 8.9", "profiles": PROFILES, "options": {}, "layers": {}, "graph_sha256": "",
             "compiled_component_sha256": "", "executed": False}
    found: EngineDetails = from_json(EngineDetails, facts | changes, "details")
    return found


def make_bundle(folder: Path, content: bytes = b"ftrt" + bytes(200), **details: Any) -> Bundle:
    """A bundle whose engine the fakes read: y = x @ w + b, in two profiles."""
    part = dataclasses.replace(AFFINE, format="tensorrt", file="components/affine/engine.trt",
                               details=engine_details(**details))
    file = folder / part.file
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    onnx.save(affine_model(), file.with_name("model.onnx"))
    return write_bundle(folder, {"affine": part})


def use(monkeypatch: Any, trt: Any) -> None:
    """Make a module stand for `tensorrt` or `tensorrt_rtx`."""
    monkeypatch.setattr(engine_session, "load_module", lambda builder, where: trt)
