"""Runs `doctor`: reports what this machine can build and run, and what is missing for the rest."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

from runtimes.errors import UnavailableError
from runtimes.system.nvidia import find_gpu

BUILD_PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "pydantic", "jinja2")


def version(distribution: str) -> str | None:
    """Installed version, or nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, instruction sets that matter for quantized kernels, cores, memory, free disk."""
    info: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    try:
        text = Path("/proc/cpuinfo").read_text()
        info["processor"] = text.split("model name")[1].split(":")[1].split("\n")[0].strip()
        flags = set(text.split("flags")[1].split("\n")[0].split())
        info["instructions"] = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
                                            "amx_bf16") if f in flags]
    except (OSError, IndexError):
        pass
    info["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info["free_disk_bytes"] = shutil.disk_usage(Path.cwd()).free
    info["python"] = platform.python_version()
    return info


def sums_in_32_bits() -> bool:
    """Whether this processor adds up 8-bit products without overflow: x86 with VNNI, and every other architecture."""
    instructions = machine().get("instructions")
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(instructions or ()))


def _finding(available: bool, detail: str, fix: str = "") -> dict[str, Any]:
    return {"available": available, "detail": detail, "fix": "" if available else fix}


def building() -> dict[str, Any]:
    """What `build` needs."""
    missing = [p for p in BUILD_PACKAGES if version(p) is None]
    findings = {"onnxruntime target": _finding(
        not missing, f"missing: {', '.join(missing)}" if missing else f"torch {version('torch')}",
        "pip install 'ldm-deploy[build]'")}
    for extra in ("openvino", "tensorrt-rtx"):
        target = f"{extra} target"
        has = version(extra)
        findings[target] = _finding(has is not None and not missing, f"{extra} {has or 'not installed'}",
                                    f"pip install 'ldm-deploy[build,{extra}]'")
    findings["tensorrt target"] = _tensorrt_target()
    return findings


def _tensorrt_target() -> dict[str, Any]:
    """Which builder `--target tensorrt` would take here."""
    if version("tensorrt") and gpu()["available"]:
        return _finding(True, f"tensorrt {version('tensorrt')}, engines for the GPU here")
    there = version("tensorrt-rtx") is not None
    return _finding(there, "through tensorrt-rtx, ahead of time" if there else "no TensorRT builder for this machine",
                    "pip install 'ldm-deploy[build,tensorrt-rtx]'; with an NVIDIA GPU, ldm-deploy[build,tensorrt]")


def running() -> dict[str, Any]:
    """What `generate` can run on."""
    findings: dict[str, Any] = {}
    providers: list[str] = []
    here = gpu()["available"]
    if util.find_spec("onnxruntime") is not None:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    has = version("onnxruntime") or version("onnxruntime-gpu")
    findings["cpu"] = _finding("CPUExecutionProvider" in providers, f"onnxruntime {has}" if has else "not installed",
                               "pip install onnxruntime")
    for name, distribution, fix in (
        ("openvino bundles", "openvino", "pip install 'ldm-deploy[openvino]'"),
        ("tensorrt bundles", "tensorrt", "pip install 'ldm-deploy[tensorrt]'"),
        ("tensorrt-rtx bundles", "tensorrt-rtx", "pip install 'ldm-deploy[tensorrt-rtx]'"),
    ):
        has = version(distribution)
        needs_gpu = distribution.startswith("tensorrt") and not here
        detail = f"{distribution} {has or 'not installed'}" + (", no NVIDIA GPU" if needs_gpu else "")
        findings[name] = _finding(has is not None and not needs_gpu, detail,
                                  "run them on a machine with an NVIDIA GPU" if has else fix)
    for device, provider, fix in (
        ("cuda", "CUDAExecutionProvider", "pip install 'ldm-deploy[gpu]' on a machine with an NVIDIA GPU"),
        ("tensorrt", "TensorrtExecutionProvider", "pip install 'ldm-deploy[gpu]', and TensorRT, on a machine with an "
                                                  "NVIDIA GPU"),
    ):
        there = provider in providers
        detail = provider if there else f"this onnxruntime has no {provider}"
        findings[device] = _finding(there and here, detail + ("" if here else ", no NVIDIA GPU"), fix)
    return findings


def gpu() -> dict[str, Any]:
    """Whether CUDA shows a GPU: what every session and the engine builder ask, too (runtimes.system.nvidia)."""
    try:
        found = find_gpu()
    except UnavailableError as error:
        return _finding(False, error.what, error.fix)
    return _finding(True, f"{found}, {found.memory_bytes >> 20} MiB")


def examine() -> dict[str, Any]:
    """Everything `doctor` shows, JSON-able."""
    return {"machine": machine(), "build": building(), "run": running(), "gpu": gpu()}
