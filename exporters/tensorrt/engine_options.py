"""Options of an engine build, and which builder takes which of them. Loads no TensorRT."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtimes.backends.tensorrt.engine_plan import MODULES
from runtimes.bundle.details import BuilderOptions
from runtimes.errors import InputError

HARDWARE = ("none", "ampere-plus", "same-compute-capability")
TILING = ("none", "fast", "moderate", "full")


@dataclass(frozen=True)
class EngineOptions(BuilderOptions):
    """Options of one engine as a bundle records them, refused where a builder does not take them.

    Each default is the builder's own, except that TF32 is off.

    Attributes:
        capabilities: of tensorrt-rtx: "SM89" and the like, ("current",) for the GPU of this machine, or () for all
            that the builder offers. Engines of `tensorrt` are always for the GPU of this machine.
        workspace_bytes: scratch memory that a layer may use; 0 leaves it to the builder.
        optimization_level: 0 (fast build) to 5 (slow build, fast engine); -1 leaves it to the builder.
        tf32: let float32 products round their inputs to 10 bits: faster, outside the accuracy budget of fp32.
        version_compatible: of tensorrt: loads in later releases of the same major version.
        hardware: of tensorrt: "ampere-plus" or "same-compute-capability" runs on more GPUs than this one.
        refittable: weights can be replaced after the build (LoRA), at some speed.
        stripped: no weights in the engine; they are read from the ONNX file beside it when it is loaded.
        weight_streaming: weights may stay in host memory at run time.
        sparse_weights: use 2:4 sparsity where the weights have it.
        tiling: of tensorrt: how hard to search for kernels that stay in the L2 cache.
        auxiliary_streams: at most this many extra streams; -1 leaves it to the builder.
        graph_capturable: refuse networks that would allocate at run time, which CUDA graphs do not survive.
    """

    def __post_init__(self) -> None:
        for name, value, known in (("builder", self.builder, tuple(MODULES)), ("hardware", self.hardware, HARDWARE),
                                   ("tiling", self.tiling, TILING)):
            if value not in known:
                _refuse(f"{name}={value!r}", f"one of {', '.join(known)}")
        if not -1 <= self.optimization_level <= 5:
            _refuse(f"optimization_level={self.optimization_level}", "0 to 5")
        if self.workspace_bytes < 0:
            _refuse(f"workspace_bytes={self.workspace_bytes}", "a number of bytes")
        self._check_builder()

    def _check_builder(self) -> None:
        """Options that a builder ignores or fails on with an internal error are refused here."""
        if self.builder == "tensorrt":
            if self.capabilities:
                _refuse("capabilities with tensorrt", "it builds for this machine's GPU; use --target tensorrt-rtx")
            return
        if self.version_compatible:
            _refuse("version_compatible with tensorrt-rtx", "TensorRT-RTX ships without the lean runtime that it needs")
        if self.hardware != "none" or self.tiling != "none":
            _refuse("hardware and tiling with tensorrt-rtx", "choose capabilities; kernels are tuned on the user's GPU")
        if (self.refittable or self.stripped) and self.capabilities != ("current",):
            # 1.7.1 ahead of time: "CHECK(sm_vers_.size() == 1) failed" for several capabilities, and for a single one
            # "graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed": it compiles such engines on a GPU.
            _refuse("a refittable or stripped engine ahead of time",
                    "TensorRT-RTX makes them on a GPU alone: capabilities=current on the machine that has it")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], builder: str) -> EngineOptions:
        """Read what a user wrote under `engine:` in a build spec.

        Raises:
            InputError: an unknown name (with the nearest), or a value of the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "builder"}
        content: dict[str, Any] = {}
        for name, value in values.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                raise InputError(f"unknown engine option {name!r}", where="engine",
                                 fix=f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}")
            default = fields[name].default
            if isinstance(default, tuple):
                value = tuple(str(v).upper().replace("CURRENT", "current") for v in
                              (value.split("+") if isinstance(value, str) else value))
            elif type(value) is not type(default):
                raise InputError(f"{name} is {value!r}, expected {type(default).__name__}", where="engine")
            content[name] = value
        return cls(builder=builder, **content)


def _refuse(what: str, fix: str) -> None:
    raise InputError(f"{what} is not possible", where="engine", fix=fix)
