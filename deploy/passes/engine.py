"""`engine`: compiles each ONNX graph to a TensorRT engine, for the GPU here or ahead of time for GPUs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.core.layer_list import carry_layers
from deploy.core.plan import Pass, Planned, Skip, Step, Unavailable, require_onnx
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json, to_json
from runtimes.bundle.tensors import Axis, ShapeRange
from runtimes.errors import InputError
from runtimes.system.cache_root import cache_home
from runtimes.system.nvidia import gpu_or_none

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec
    from exporters.tensorrt.engine_options import EngineOptions
    from exporters.tensorrt.optimization_profiles import Profile

FORMAT, ENGINE_FILE, WEIGHTS_FILE = "tensorrt", "engine.trt", "model.onnx"
TARGETS = ("tensorrt", "tensorrt-rtx")
NOT_EXECUTED = "built ahead of time; parity is that of the very ONNX graph that was compiled; `verify` it on the target"


class Engine(Pass):
    """One engine per component. Which builder, which GPUs and what was refused stands in the component's details."""

    name: ClassVar[str] = "engine"
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-rtx")
    verify: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Choose the builder, resolve every option and profile."""
        if spec.target not in TARGETS:
            return Skip(f"the target is {spec.target}")
        require_onnx(before, self.name, "engines are compiled from graphs: engine comes last")
        builder = choose_builder(spec.target, gpu_here())
        if isinstance(builder, Unavailable):
            return builder
        from exporters.tensorrt.engine_options import EngineOptions

        wanted = dict(spec.engine)
        static, keep_graph = bool(wanted.pop("static", False)), bool(wanted.pop("keep_graph", False))
        options = EngineOptions.from_mapping(wanted, builder)
        config = {"options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()},
                  "static": static, "keep_graph": keep_graph, "gpu": gpu_here() if builder == "tensorrt" else "",
                  "profiles": [{a: [r.min, r.opt, r.max] for a, r in p.items()} for p in spec.profiles]}
        for name, component in before.components.items():
            component_profiles(component, before, config, name)  # refuses impossible profiles before any work
        components = {n: replace(c, format=FORMAT, file=f"components/{n}/{ENGINE_FILE}", files={})
                      for n, c in before.components.items()}
        where = f"this {config['gpu']}" if builder == "tensorrt" else (
            ", ".join(options.capabilities) or "every compute capability on offer")
        step = Step(self.name, self.version, config, {n: (n,) for n in components},
                    replace(before, components=components), f"{builder} engines for {where}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Compile one graph in a process of its own."""
        from exporters.onnx.quantizer_nodes import find_quantizers
        from exporters.tensorrt.engine_builder import build_engine
        from exporters.tensorrt.engine_options import EngineOptions

        before, planned = source.component(name), step.after.components[name]
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in step.config["options"].items()}
        options = EngineOptions(**values)
        folder = out / "components" / name
        profiles = component_profiles(before, source.manifest, step.config, name)
        report = build_engine(source.file(before.file), folder / ENGINE_FILE, profiles, options,
                              timing_cache=timing_cache(options, step.config["gpu"]))
        facts = {**report.to_json(), "options": step.config["options"], "gpu": step.config["gpu"],
                 "compiled_component_sha256": before.sha256, "executed": False, "not_executed": NOT_EXECUTED}
        if (quantizers := find_quantizers(source.file(before.file))).inputs:
            facts["quantizers"] = quantizers.to_json()
        reloads = options.stripped or options.refittable
        if reloads or step.config["keep_graph"]:
            for file in before.files:
                link_or_copy(source.path / file, out / file)
            facts["weights" if reloads else "graph"] = before.file
        else:
            carry_layers(source, before, out)
        details = from_json(EngineDetails, {**to_json(before.details), **facts}, name)
        return replace(planned, files=records_below(folder, out), details=details)


def choose_builder(target: str, gpu: str) -> str | Unavailable:
    """The builder of a target on this machine; never one that would build for something else than was asked.

    Args:
        target: "tensorrt" takes its own builder where a GPU is, and tensorrt-rtx ahead of time elsewhere.
        gpu: from `gpu_here`, empty without one.
    """
    from exporters.tensorrt.engine_builder import installed

    if target == "tensorrt" and gpu and installed("tensorrt"):
        return "tensorrt"
    if installed("tensorrt-rtx"):
        return "tensorrt-rtx"
    if target == "tensorrt" and installed("tensorrt"):
        return Unavailable("tensorrt builds for the GPU of this machine, and there is none", "target tensorrt",
                           "pip install 'ldm-deploy[tensorrt-rtx]', which builds without a GPU")
    return Unavailable("no TensorRT builder is installed", f"target {target}",
                       "pip install 'ldm-deploy[tensorrt-rtx]', which builds without a GPU")


def gpu_here() -> str:
    """Name and compute capability of the GPU that CUDA shows first, "NVIDIA H100, 9.0"; empty without one.

    It is the one that the builder builds for: nvidia-smi lists others too, where CUDA_VISIBLE_DEVICES hides them.
    """
    gpu = gpu_or_none()
    return str(gpu) if gpu is not None else ""


def timing_cache(options: EngineOptions, gpu: str) -> Path | None:
    """Where `tensorrt` keeps what it timed, per GPU; TensorRT-RTX times nothing at build time."""
    
    if options.builder != "tensorrt":
        return None
    folder = cache_home() / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"timing-{''.join(c if c.isalnum() else '-' for c in gpu)}.cache"


def component_profiles(component: Component, manifest: Manifest, config: Mapping[str, Any], name: str,
                       ) -> tuple[Profile, ...]:
    """The engine's profiles; the user's are in images, pixels and tokens, the component's axes may be in others.

    Raises:
        InputError: a profile outside the model's limits.
    """
    from exporters.tensorrt.optimization_profiles import make_profiles

    wanted = [
        {axis: sizes for axis in component.axes
         if (sizes := _in_units_of(axis, component.axes, manifest, profile)) is not None}
        for profile in config["profiles"]
    ]
    return make_profiles(component.inputs, component.axes, wanted, static=config["static"], where=name)


def _in_units_of(axis: str, axes: Mapping[str, Axis], manifest: Manifest, profile: Mapping[str, list[int]],
                 ) -> ShapeRange | None:
    """A range of the profile in units of one axis: rows doubled under guidance, pixels divided for latents."""
    user = axis.removeprefix("image_")
    if user not in profile:
        return None
    low, common, high = profile[user]
    if axis == "batch":
        decoder = manifest.components.get(manifest.pipeline.codec.decoder.component)
        images = decoder.axes["batch"].range.max if decoder is not None and "batch" in decoder.axes else 0
        rows = max(axes[axis].range.max // images, 1) if images else 1
        return ShapeRange(low, common * rows, high * rows)
    if axis in ("height", "width"):
        factor = manifest.pipeline.codec.factor
        if low % factor or common % factor or high % factor:
            raise InputError(f"{axis}={low}:{common}:{high} pixels are not multiples of {factor}", where="profile")
        return ShapeRange(low // factor, common // factor, high // factor)
    return ShapeRange(low, common, high)
