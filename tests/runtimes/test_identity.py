"""A proof is of a device, a driver and releases: what changes one of them is another identity."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runtimes.system import compute_identity
from runtimes.system.compute_identity import runtime_identity
from runtimes.system.device import CPU, Device
from runtimes.system.nvidia import Gpu

ASKED = (CPU, "tensorrt"), (Device("tensorrt"), "onnx"), (CPU, "onnx")
GPU, OTHER = Gpu("NVIDIA A", (8, 9), 80 << 30), Gpu("NVIDIA C", (9, 0), 80 << 30)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine with a GPU, of which a test may change anything."""
    found: dict[str, Any] = {"gpu": GPU, "cuda": 12040, "versions": {"tensorrt": "10.1", "onnxruntime": "1.20"}}

    def version(name: str) -> str:
        if name not in found["versions"]:
            raise metadata.PackageNotFoundError(name)
        return str(found["versions"][name])

    (tmp_path / "version").write_text("NVRM version: 550.1\nGCC\n")
    monkeypatch.setattr(compute_identity, "gpu_or_none", lambda ordinal=0: found["gpu"] if ordinal == 0 else OTHER)
    monkeypatch.setattr(compute_identity, "cuda_version", lambda: found["cuda"])
    monkeypatch.setattr("runtimes.system.compute_identity.metadata.version", version)
    monkeypatch.setattr(compute_identity, "DRIVER_FILE", tmp_path / "version")
    return found | {"file": tmp_path / "version", "state": found}


def change(machine: dict[str, Any], what: str) -> None:
    state = machine["state"]
    if what == "driver":
        machine["file"].write_text("NVRM version: 560.2\n")
    elif what == "TensorRT":
        state["versions"] = {**state["versions"], "tensorrt": "10.2"}
    elif what == "TensorRT for RTX":
        state["versions"] = {**state["versions"], "tensorrt-rtx": "1.0"}
    else:
        state.update({"GPU": {"gpu": Gpu("NVIDIA B", (8, 9), 80 << 30)}, "memory": {"gpu": Gpu("NVIDIA A", (8, 9), 1)},
                      "no GPU": {"gpu": None}, "CUDA": {"cuda": 12080}}[what])


@pytest.mark.parametrize("what", ["GPU", "memory", "no GPU", "driver", "CUDA", "TensorRT", "TensorRT for RTX"])
def test_an_engines_proof_is_of_this_gpu_driver_and_release(machine: dict[str, Any], what: str):
    before = [runtime_identity(*asked) for asked in ASKED]
    change(machine, what)
    after = [runtime_identity(*asked) for asked in ASKED]
    assert before[0] != after[0]
    assert (before[1] != after[1]) == (what != "TensorRT for RTX"), "that provider is not asked for"
    assert before[2] == after[2], "a CPU's proof does not depend on the GPU beside it"


def test_a_proof_on_a_cpu_is_of_its_model_and_instructions_and_of_their_limits(machine, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = runtime_identity(CPU, "onnx")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    limited = runtime_identity(CPU, "onnx")
    monkeypatch.setattr(compute_identity, "processor", lambda: "another")
    assert len({json.dumps(found) for found in (before, limited, runtime_identity(CPU, "onnx"))}) == 3
    assert before["libraries"]["onnxruntime"] == "1.20" and before["libraries"]["onnxruntime-gpu"] == "absent"
    assert "gpu" not in before


def test_this_machines_own_identity_is_json_and_the_same_twice():
    for asked in ((CPU, "onnx"), (CPU, "openvino"), (CPU, "tensorrt"), (Device("cuda"), "onnx"), (CPU, "safetensors")):
        found = runtime_identity(*asked)
        assert json.loads(json.dumps(found)) == found == runtime_identity(*asked)


@pytest.mark.parametrize(("kind", "format_"), [("cuda", "tensorrt"), ("tensorrt", "onnx")])
def test_a_proof_on_the_second_gpu_is_of_that_gpu(machine: dict[str, Any], kind: str, format_: str):
    first, second = (runtime_identity(Device(kind, index), format_) for index in (0, 1))
    assert (first["device"], second["device"]) == (kind, f"{kind}:1")
    assert (first["gpu"], second["gpu"]) == ("NVIDIA A, 8.9", "NVIDIA C, 9.0")
