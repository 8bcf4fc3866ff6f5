"""Decides, without a GPU, how an engine runs: which profile, where buffers lie, what is refused."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.bundle.details import EngineDetails
from runtimes.bundle.manifest import Component
from runtimes.bundle.tensors import DTYPES
from runtimes.errors import BundleError, InputError, UnavailableError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # builder -> module that runs its engines
PACKAGES = {"tensorrt": "pip install 'ldm-deploy[tensorrt]'", "tensorrt-rtx": "pip install 'ldm-deploy[tensorrt-rtx]'"}
ALIGNMENT = 256  # what cudaMalloc gives, and TensorRT asks for
MOST_GRAPHS = 8  # captured CUDA graphs per engine, each with an execution context of its own
# TensorRT's DataType -> how a TensorSpec says it.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
         "BOOL": "bool", "UINT8": "uint8"}
_MAGIC = re.compile(rb"[a-z]trt")

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class ShapeLimits:
    """Smallest, most common and largest shape of one input in one profile."""

    low: Shape
    common: Shape
    high: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether a shape lies within."""
        if len(shape) != len(self.low):
            return False
        return all(a <= n <= b for a, n, b in zip(self.low, shape, self.high, strict=True))

    def distance(self, shape: Shape) -> float:
        """How far a shape is from the one that the kernels were tuned for, in octaves."""
        return sum(abs(math.log2(n / o)) for n, o in zip(shape, self.common, strict=True) if n and o)


Profile = Mapping[str, ShapeLimits]


def profiles_of(component: Component, where: str) -> tuple[Profile, ...]:
    """The engine's profiles as the manifest states them.

    Raises:
        BundleError: missing or malformed.
    """
    stated = component.details_as(EngineDetails).profiles
    if not stated or any(len(shapes) != 3 for profile in stated for shapes in profile.values()):
        raise BundleError("the manifest does not state the engine's profiles", where=where,
                          fix="build the bundle again")
    return tuple({name: ShapeLimits(*shapes) for name, shapes in profile.items()} for profile in stated)


def check_engine_profiles(stated: Sequence[Profile], found: Sequence[Profile], where: str) -> None:
    """Refuse an engine whose profiles are not those that shapes are checked against.

    Raises:
        BundleError: names the first difference.
    """
    if len(stated) != len(found):
        raise BundleError(f"the engine has {len(found)} profiles, the manifest {len(stated)}", where=where,
                          fix="build the bundle again")
    for index, (ours, engines) in enumerate(zip(stated, found, strict=True)):
        for name, limits in engines.items():
            if name not in ours or (ours[name].low, ours[name].high) != (limits.low, limits.high):
                here = _span(ours[name]) if name in ours else "nothing"
                raise BundleError(f"profile {index} of the engine takes {name} {_span(limits)}, the manifest {here}",
                                  where=where, fix="build the bundle again")


def check_tensors(component: Component, found: Mapping[str, tuple[str, str]], where: str) -> None:
    """Refuse an engine whose inputs and outputs are not the manifest's.

    Args:
        component: what the manifest says.
        found: tensor -> "INPUT" or "OUTPUT", and TensorRT's name of its type.
        where: for the error.

    Raises:
        BundleError: names the first tensor that differs, and how.
    """
    stated = {**{s.name: ("INPUT", s.dtype) for s in component.inputs},
              **{s.name: ("OUTPUT", s.dtype) for s in component.outputs}}
    if set(stated) != set(found):
        raise BundleError(f"the engine has {sorted(found)}, the manifest {sorted(stated)}", where=where,
                          fix="build the bundle again")
    for name, (mode, dtype) in stated.items():
        has_mode, has_dtype = found[name]
        if (mode, dtype) != (has_mode, TYPES.get(has_dtype, has_dtype)):
            raise BundleError(f"{name} is {has_mode.lower()} of {TYPES.get(has_dtype, has_dtype)} in the engine, "
                              f"{mode.lower()} of {dtype} in the manifest", where=where, fix="build the bundle again")


def choose_profile(profiles: Sequence[Profile], shapes: Shapes, where: str) -> int:
    """The profile tuned nearest to these shapes among those that hold them.

    Raises:
        InputError: no profile holds them; lists what the engine takes.
    """
    fitting = [(sum(p[n].distance(s) for n, s in shapes.items()), i) for i, p in enumerate(profiles)
               if all(n in p and p[n].holds(s) for n, s in shapes.items())]
    if fitting:
        return min(fitting)[1]
    takes = "; or ".join(", ".join(f"{n} {_span(limit)}" for n, limit in p.items()) for p in profiles)
    raise InputError(f"no profile of the engine holds {', '.join(f'{n} {_text(s)}' for n, s in shapes.items())}",
                     where=where, fix=f"it takes {takes}; or rebuild with other --shapes")


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _span(limit: ShapeLimits) -> str:
    return _text(limit.low) if limit.low == limit.high else f"{_text(limit.low)} to {_text(limit.high)}"


@dataclass(frozen=True)
class BufferPlan:
    """One device allocation for all inputs and outputs, large enough for every profile.

    Attributes:
        offsets: tensor -> first byte within the allocation.
        sizes: tensor -> bytes reserved.
        total_bytes: of the allocation.
    """

    offsets: Mapping[str, int]
    sizes: Mapping[str, int]
    total_bytes: int

    def reserved(self, name: str) -> int:
        """Bytes up to the next tensor: its size, rounded up to the alignment."""
        return _aligned(self.sizes[name])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_buffers(component: Component, where: str) -> BufferPlan:
    """Lay inputs and outputs out one after the other at their largest.

    Raises:
        BundleError: an output has an axis that no input has, so that its size cannot be known beforehand.
    """
    largest = {name: axis.range.max for name, axis in component.axes.items()}
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    total = 0
    for spec in (*component.inputs, *component.outputs):
        if missing := [d for d in spec.shape if isinstance(d, str) and d not in largest]:
            raise BundleError(f"{spec.name} has the axis {missing[0]} without a range", where=where,
                              fix="build the bundle again")
        offsets[spec.name] = total
        sizes[spec.name] = math.prod(spec.resolve(largest)) * np.dtype(DTYPES[spec.dtype]).itemsize
        total += _aligned(sizes[spec.name])
    return BufferPlan(offsets, sizes, total)


def shape_key(profile: int, shapes: Shapes) -> tuple[int, tuple[tuple[str, Shape], ...]]:
    """What a captured CUDA graph is good for: these shapes under this profile, nothing else."""
    return profile, tuple(sorted(shapes.items()))


def check_builder(component: Component, where: str) -> str:
    """The builder whose runtime must load the engine.

    Raises:
        BundleError: the manifest names none that we know.
    """
    builder = component.details_as(EngineDetails).builder
    if builder not in MODULES:
        raise BundleError(f"the engine's builder is {builder!r}, expected one of {', '.join(MODULES)}", where=where,
                          fix="build the bundle again")
    return builder


def check_version(component: Component, installed: str, where: str) -> None:
    """Refuse an engine of another release; only its own can load it, unless it was built version-compatible.

    Raises:
        UnavailableError: says both versions.
    """
    engine = component.details_as(EngineDetails)
    builder, built = engine.builder, engine.builder_version
    compatible = engine.options.version_compatible
    same = built.split(".")[0] == installed.split(".")[0] if compatible else built == installed
    if not same:
        raise UnavailableError(f"the engine was built by {builder} {built}, here is {installed}", where=where,
                               fix=f"pip install {builder}=={built}, or build the bundle again")


def check_gpu(component: Component, name: str, capability: tuple[int, int], where: str) -> None:
    """Refuse a GPU for which the engine holds no code.

    Raises:
        UnavailableError: names the GPU and what the engine was built for.
    """
    here = f"SM{capability[0]}{capability[1]}"
    engine = component.details_as(EngineDetails)
    built_for = engine.compute_capabilities
    if built_for and "current" not in built_for:
        if here not in built_for:
            refused = engine.refused_capabilities
            why = f"; the builder refused {here}: {refused[here]}" if here in refused else ""
            raise UnavailableError(f"{name} is {here}, the engine is for {', '.join(built_for)}{why}", where=where,
                                   fix="build on this machine, or with this GPU among the engine's capabilities")
        return
    gpu, portable = engine.gpu, engine.options.hardware != "none"
    if gpu and not portable and not gpu.endswith(f"{capability[0]}.{capability[1]}"):
        raise UnavailableError(f"{name} is {here}, the engine was built on {gpu}", where=where,
                               fix="build the bundle on this machine")


def check_header(head: bytes, file_bytes: int, where: str) -> None:
    """Refuse a file that is no engine, or a cut one, before a driver is asked.

    The length field is TensorRT-RTX's, as seen in 1.7; other engines have it elsewhere and are left to TensorRT.

    Raises:
        BundleError: says which.
    """
    if len(head) < 64 or not _MAGIC.match(head):
        raise BundleError("not a TensorRT engine", where=where, fix="build the bundle again")
    if head[:4] == b"vtrt" and (stated := struct.unpack_from("<Q", head, 16)[0]) != file_bytes:
        raise BundleError(f"the engine has {file_bytes} bytes, its header says {stated}", where=where,
                          fix="copy the bundle again or rebuild it")


# Members of TensorRT-RTX's EngineInvalidityDiagnostics -> what to say.
_INVALID = {
    "VERSION_MISMATCH": ("the engine is of another TensorRT version", "build the bundle again with the installed one"),
    "UNSUPPORTED_CC": ("the engine holds no code for this GPU", "build with this GPU among the engine's capabilities"),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old for the engine", "update the driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old for the engine", "update TensorRT"),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory for the engine", "free GPU memory, or build fp16"),
    "MALFORMED_ENGINE": ("the engine is damaged", "copy the bundle again or rebuild it"),
    "CUDA_ERROR": ("CUDA failed while the engine was checked", "see that nvidia-smi works"),
}


def check_validity(valid: bool, diagnostics: Sequence[str], where: str) -> None:
    """Turn TensorRT's own check of an engine into one clear line.

    Raises:
        UnavailableError: the first diagnosis that we know, or that there was none.
    """
    if valid:
        return
    for name in diagnostics:
        if name in _INVALID:
            what, fix = _INVALID[name]
            raise UnavailableError(what, where=where, fix=fix)
    raise UnavailableError("TensorRT says that the engine is not valid here, without a reason", where=where,
                           fix="build the bundle on this machine")


def runtime_cache_file(folder: Path, component: Component, gpu: str, installed: str) -> Path:
    """Where TensorRT-RTX's kernels of one engine on one GPU are kept; another engine, GPU or release has another."""
    key = hashlib.sha256("\0".join((component.sha256, gpu, installed)).encode()).hexdigest()[:32]
    return folder / f"{key}.rtxcache"
