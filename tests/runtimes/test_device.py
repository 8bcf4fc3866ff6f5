"""How options name a device, read once for the command line, `load` and every backend."""

from __future__ import annotations

from pathlib import Path

import pytest

import runtimes
from runtimes.errors import InputError
from runtimes.system.device import CPU, KINDS, Device
from tests.runtimes.fakes import write_pipeline_bundle


@pytest.mark.parametrize(("text", "kind", "index", "printed"), [
    ("cpu", "cpu", 0, "cpu"), ("CPU", "cpu", 0, "cpu"), ("cuda", "cuda", 0, "cuda"), ("cuda:0", "cuda", 0, "cuda"),
    ("cuda:1", "cuda", 1, "cuda:1"), ("tensorrt:0", "tensorrt", 0, "tensorrt"), (" auto ", "auto", 0, "auto"),
    ("tensorrt-rtx:12", "tensorrt-rtx", 12, "tensorrt-rtx:12"), ("GPU.1", "gpu", 1, "gpu:1"), ("npu", "npu", 0, "npu"),
])
def test_a_device_is_a_kind_and_a_number(text, kind, index, printed):
    device = Device.parse(text)
    assert (device.kind, device.index, str(device)) == (kind, index, printed)
    assert Device.parse(printed) == device == Device.parse(device)


@pytest.mark.parametrize("text", ["", "cuda:", ":1", "cuda:-1", "cuda:one", "cuda:1:2", "cuda 1", "cuda:99999", "cpu:0",
                                  "auto:1", "npu:1", "cuda1", "cuda:1.5", "\u0661", "cuda:\u0661"])
def test_what_is_no_device_is_refused_with_the_forms(text):
    with pytest.raises(InputError, match="device") as caught:
        Device.parse(text)
    assert caught.value.exit_code == 2 and "cuda:1" in caught.value.fix


def test_a_kind_that_nobody_knows_is_refused_also_without_parsing():
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        Device("tpu")
    with pytest.raises(InputError, match="cpu has no number 1"):
        Device("cpu", 1)
    with pytest.raises(InputError, match="cuda has no number -1"):
        Device("cuda", -1)
    assert Device() == CPU and set(KINDS) >= {CPU.kind}


def test_load_takes_the_same_names(tmp_path: Path):
    write_pipeline_bundle(tmp_path / "b", 49408)
    with pytest.raises(InputError, match="'cuda:' is no device"):
        runtimes.load(tmp_path / "b", device="cuda:")
    with pytest.raises(InputError, match="for ONNX Runtime does not run on 'gpu'"):
        runtimes.load(tmp_path / "b", device="gpu:1")
