"""Names what runs a component on this machine: device, libraries, driver and processor, on which its numbers depend."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runtimes.system.device import Device
from runtimes.system.nvidia import LIBRARY, gpu_or_none

ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
RTX = ("tensorrt-rtx",)
CUDA = ("cuda-bindings", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
# Component's format -> distributions that its session runs on; "" stands for the PyTorch reference's formats.
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "onnx": ONNXRUNTIME, "openvino": ("openvino", "openvino-telemetry"), "tensorrt": (*TENSORRT, *RTX, *CUDA),
    "": ("torch", "diffusers", "transformers"),
}
# Device -> what an execution provider needs besides the format's own.
PROVIDERS: Mapping[str, tuple[str, ...]] = {"cuda": CUDA, "tensorrt": (*TENSORRT, *CUDA), "tensorrt-rtx": (*RTX, *CUDA)}
# Variables that limit the instructions that kernels are chosen by.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "CUDA_VISIBLE_DEVICES",
          "NVIDIA_TF32_OVERRIDE")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def runtime_identity(device: Device, format_: str) -> dict[str, Any]:
    """Everything about this machine that decides a component's numbers, JSON-able.

    Args:
        device: of the session, as `SessionOptions.device`.
        format_: of the component.

    Returns:
        device, libraries with their releases ("absent" if there are none), the limits that the environment sets, and
        the processor; for whatever runs on a GPU, also the GPU, the driver's release and CUDA's.
    """
    names = (*LIBRARIES.get(format_, LIBRARIES[""]), *PROVIDERS.get(device.kind, ()))
    found: dict[str, Any] = {
        "device": str(device), "libraries": {name: _version(name) for name in sorted(set(names))},
        "processor": processor(),
        "limits": {name: os.environ[name] for name in LIMITS if os.environ.get(name)},
    }
    if format_ == "tensorrt" or device.kind != "cpu":
        gpu = gpu_or_none(device.index)
        memory = 0 if gpu is None else gpu.memory_bytes
        found |= {"gpu": str(gpu or ""), "gpu_memory_bytes": memory, "driver": driver(), "cuda": cuda_version()}
    return found


def processor() -> str:
    """Everything about the processor that decides which kernels and layouts are chosen."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {model} {flags}"


def driver() -> str:
    """The NVIDIA driver's release as its kernel module says it; empty without one."""
    try:
        return DRIVER_FILE.read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def cuda_version() -> int:
    """The latest CUDA that the driver supports, 12040 for 12.4; 0 without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"
