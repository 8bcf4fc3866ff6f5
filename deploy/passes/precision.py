"""`precision`: converts graphs to 16 bits: to compute in them on GPUs, only to store weights in them on CPUs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploy.core.layer_list import carry_layers
from deploy.core.plan import Pass, Planned, Skip, Step, require_onnx
from runtimes.bundle.details import Conversion, GraphDetails
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json
from runtimes.bundle.roles import Role, Roles
from runtimes.codec.autoencoder import unscaled

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

PROBES = 4
NAMES = {"fp16": "float16", "bf16": "bfloat16"}
MODES = {"tensorrt": "compute", "tensorrt-rtx": "compute", "onnxruntime": "storage", "openvino": "storage"}


class Precision(Pass):
    """float32 graphs to 16 bits, with the nodes that need float32 kept in it (exporters.precision.sixteen_bits)."""

    name: ClassVar[str] = "precision"
    version: ClassVar[int] = 3
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx-ir", "ml-dtypes")
    verify: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every float32 graph when the spec says fp16 or bf16; for TensorRT also what INT8 left in float32."""
        mode = MODES[spec.graph_target]
        beside_integers = spec.precision in ("int8", "auto") and mode == "compute"
        if spec.precision not in NAMES and not beside_integers:
            return Skip(f"the build is {spec.precision}")
        require_onnx(before, self.name, "precision comes after export and before engine")
        low = "fp16" if beside_integers else spec.precision
        config = {"precision": low, "mode": mode, "keep": list(spec.keep)}
        chosen = [n for n, c in before.components.items() if beside_integers or c.precision == "fp32"]
        if not chosen:
            return Skip("every component is below float32 already")
        components = {n: replace(c, precision=c.precision if beside_integers else low, files={})
                      if n in chosen else c for n, c in before.components.items()}
        step = Step(self.name, self.version, config, {n: (n,) for n in chosen},
                    replace(before, components=components), f"{NAMES[low]}, {mode}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Convert one graph; what stayed float32, and why, is kept in the component's details."""
        from exporters.precision.sixteen_bits import convert_precision

        planned = step.after.components[name]
        folder = out / "components" / name
        folder.mkdir(parents=True)
        before, graph = source.component(name), folder / "model.onnx"
        convert = partial(convert_precision, source.file(before.file), graph, step.config["precision"],
                          mode=step.config["mode"])
        report = convert(keep=patterns_for(name, source, step.config["keep"]))
        details, decodes = before.details_as(GraphDetails), source.manifest.pipeline.role(name) is Role.IMAGE_DECODER
        if decodes and (step.config["precision"], step.config["mode"]) == ("fp16", "compute") and (
                why := overflow(graph, before, source.manifest.pipeline)):
            shutil.rmtree(folder)
            report = convert(keep=["*"])
            details = replace(details, planned_precision=planned.precision, not_fp16=why)
            planned = replace(planned, precision=before.precision)
        carry_layers(source, before, out)
        return replace(planned, files=records_below(folder, out),
                       details=replace(details, conversion=from_json(Conversion, report.to_json(), name)))


def overflow(low: Path, decoder: Component, roles: Roles) -> str:
    """Whether a float16 decoder fails: its emulation, which a CPU can run, on noise as large as latents are.

    Decoders that were trained in float32 may hold values above 65,504: that of Stable Diffusion XL does
    (madebyollin/sdxl-vae-fp16-fix), and generates black images.

    Args:
        low: the graph that computes in float16.
        decoder: its record, in float32.
        roles: of the pipeline, whose codec says how latents of unit variance are decoded.

    Returns:
        what happens, empty if nothing does.
    """
    from calibration.trajectory.inner_tensors import plain_session
    from exporters.precision.emulation import emulate

    latents = decoder.inputs[0]
    shape = latents.resolve({axis: a.range.min for axis, a in decoder.axes.items()})
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="ldm-overflow-", dir=low.parent) as scratch:
        emulate(low, Path(scratch) / low.name)
        session = plain_session(Path(scratch) / low.name, threads=0)
        for _ in range(PROBES):
            noise = unscaled(roles.codec, random.standard_normal(shape, np.float32))
            images = session.run(None, {latents.name: noise})
            if wrong := sum(int((~np.isfinite(image)).sum()) for image in images):
                return f"{wrong} of {sum(p.size for p in images)} values of an image are not finite"
    return ""


def patterns_for(name: str, source: Bundle, keep: Sequence[str]) -> list[str]:
    """The patterns that fit something in one component; each must fit in some component.

    Raises:
        InputError: one fits nowhere; names close matches.
    """
    if not keep:
        return []
    import onnx_ir as ir

    from calibration.graphs.layers import check_patterns
    from exporters.precision.float32_nodes import names_in

    def names_of(part: str) -> list[str]:
        return names_in(ir.load(source.file(source.component(part).file)).graph)

    if "quantize" not in {record.name for record in source.manifest.passes}:  # which checked them, and renamed weights
        check_patterns(keep, {part: names_of(part) for part in source.manifest.components})
    own = names_of(name)
    return [pattern for pattern in keep if any(fnmatchcase(text, pattern) for text in own)]
