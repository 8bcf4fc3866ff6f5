"""`hoist`: takes out of the denoiser's graph what does not depend on the sample, to be computed before the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step, require_onnx
from runtimes.adapters.lora_inputs import with_inputs
from runtimes.bundle.details import GraphDetails, LoraInputs
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.bundle.roles import PER_PROMPT, ROWS, Entry
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec
    from exporters.hoisting.apart import Hoisting

USUAL_STEPS, MOST_STEPS = 25, 1000  # rows of a call that holds a schedule


class Hoist(Pass):
    """Exact: the same operators on the same numbers, less often. What leaves follows from the graph's data alone."""

    name: ClassVar[str] = "hoist"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnx-ir", "scipy")
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """The denoiser and its other entry; what they become shows when their graphs are there: `settle`."""
        if not spec.hoist:
            return Skip("the build says --no-hoist")
        require_onnx(before, self.name, "hoist comes after export and before optimize")
        from exporters.hoisting.cut import MOST_BYTES, SPEEDS
        from exporters.hoisting.cut import MOST_STEPS as COUNTED_STEPS

        denoiser, condition = before.pipeline.denoiser, before.pipeline.conditioner
        config = {"speeds": asdict(SPEEDS[spec.graph_target]), "most_bytes": MOST_BYTES, "steps": COUNTED_STEPS,
                  "timestep": denoiser.timestep, "prompt": sorted({condition.context, condition.pooled} - {""}),
                  "numbers": sorted(condition.numbers)}
        shallow = (denoiser.shallow.component,) if denoiser.shallow is not None else ()
        reads = {denoiser.component: (denoiser.component,), **{n: (denoiser.component, n) for n in shallow}}
        return Step(self.name, self.version, config, reads, before, "what needs no sample, before the steps").recorded()

    def settle(self, step: Step, source: Bundle) -> Planned:
        """Analyse the graph, and say exactly what will be there."""
        hoisting = _analysed(step, source)
        if not hoisting.values:
            return Skip("nothing of the denoiser is worth computing beforehand")
        manifest, role = source.manifest, source.manifest.pipeline.denoiser
        whole = source.component(role.component)
        entries = {str(kind): Entry(f"{role.component}_{kind.replace('-', '_')}",
                                    tuple(value.name for value in hoisting.of(kind))) for kind in hoisting.takes}
        components = dict(manifest.components)
        reads: dict[str, tuple[str, ...]] = {}
        for kind in hoisting.takes:
            components[entries[kind].component] = _entry(whole, entries[kind], hoisting, kind)
            reads[entries[kind].component] = (role.component,)
        for name in step.reads:
            components[name] = _steps(components[name], hoisting, _remaining(source, name, hoisting))
            reads[name] = step.reads[name]
        pipeline = replace(manifest.pipeline, denoiser=replace(role, entries={**role.entries, **entries}))
        after = replace(step.after, components=components, pipeline=pipeline)
        counts = ", ".join(f"{len(hoisting.of(kind))} {kind}" for kind in hoisting.takes)
        return replace(step, after=after, reads=reads, summary=f"inputs of the steps that need no sample: {counts}")

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Write the step graph, its other entry, or one of the graphs that run beforehand."""
        from exporters.hoisting.apart import content_at, write_entry, write_steps

        hoisting, role = _analysed(step, source), source.manifest.pipeline.denoiser
        planned, whole = step.after.components[name], source.component(role.component)
        target, graph = out / planned.file, source.file(whole.file)
        kinds = {entry.component: kind for kind, entry in step.after.pipeline.denoiser.beforehand.items()}
        if name in kinds:
            values = [value for value in hoisting.values if value.kind == kinds[name]]
            content = write_entry(graph, target, values, str(whole.inputs[0].shape[0]), ROWS)
            return replace(planned, parameters=content.parameters, files=records_below(target.parent, out))
        own = source.file(source.component(name).file)
        content = write_steps(own, target, hoisting.values, None if name == role.component else graph)
        gone = content_at(own).parameters - content.parameters
        return replace(planned, parameters=source.component(name).parameters - gone,
                       files=records_below(target.parent, out))

    def measure(self, step: Step, before: Bundle, after: Bundle) -> dict[str, Any]:
        """Operators, weights and bytes that the step graph has no more."""
        from exporters.hoisting.apart import content_at

        found = {}
        for name in (n for n in step.reads if n in before.manifest.components):
            whole, left = (content_at(bundle.file(bundle.component(name).file)) for bundle in (before, after))
            found[name] = {"bytes_ratio": round(left.bytes / max(whole.bytes, 1), 4), "verdict": (
                f"{whole.nodes - left.nodes} of {whole.nodes} operators and {whole.parameters - left.parameters:,} of "
                f"{whole.parameters:,} parameters leave the steps")}
        return found


def _analysed(step: Step, source: Bundle) -> Hoisting:
    """What leaves the graph of the denoiser; the same at every call."""
    import onnx_ir as ir

    from exporters.hoisting.apart import analyse
    from exporters.hoisting.classes import Inputs
    from exporters.hoisting.cut import Speeds

    component, config = source.component(source.manifest.pipeline.denoiser.component), step.config
    whole = with_inputs(component)
    adapters = frozenset(spec.name for spec in whole.inputs) - {spec.name for spec in component.inputs}
    inputs = Inputs(str(component.inputs[0].shape[0]), config["timestep"], frozenset(config["prompt"]),
                    frozenset(config["numbers"]), adapters)
    return analyse(partial(ir.load, source.file(component.file)), inputs, whole.axes, Speeds(**config["speeds"]))


def _remaining(source: Bundle, name: str, hoisting: Hoisting) -> tuple[str, ...]:
    """The inputs of the exported graph that a step graph still takes."""
    if name == source.manifest.pipeline.denoiser.component:
        return hoisting.remain
    import onnx_ir as ir

    from exporters.hoisting.apart import inputs_of_other

    whole = source.file(source.component(source.manifest.pipeline.denoiser.component).file)
    return inputs_of_other(ir.load(whole), ir.load(source.file(source.component(name).file)), hoisting.values)


def _steps(component: Component, hoisting: Hoisting, remain: Sequence[str]) -> Component:
    """The record of a step graph: what remains of its inputs, then the values."""
    values = {value.name: value.spec for value in hoisting.values}
    inputs = (*(spec for spec in component.inputs if spec.name in remain),
              *(values[name] for name in remain if name in values))
    used = {d for spec in (*inputs, *component.outputs) for d in spec.shape}
    return replace(component, inputs=inputs, axes={n: a for n, a in component.axes.items() if n in used}, files={},
                   details=_with_lora(component.details_as(GraphDetails), remain))


def _entry(whole: Component, entry: Entry, hoisting: Hoisting, kind: Any) -> Component:
    """The record of a graph that runs beforehand: rows of prompts or timesteps instead of images."""
    batch, takes = whole.inputs[0].shape[0], hoisting.takes[kind]

    def in_rows(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(ROWS if d == batch else d for d in spec.shape))

    inputs = tuple(in_rows(spec) for name in takes for spec in whole.inputs if spec.name == name)
    outputs = tuple(in_rows(value.spec) for value in hoisting.of(kind))
    used = {d for spec in (*inputs, *outputs) for d in spec.shape}
    most = whole.axes[str(batch)].range.max
    rows = Axis("prompts", ShapeRange(1, min(2, most), most)) if kind == PER_PROMPT else Axis(
        "timesteps", ShapeRange(1, USUAL_STEPS, MOST_STEPS))
    details = _with_lora(whole.details_as(GraphDetails), takes)
    return replace(whole, file=f"components/{entry.component}/model.onnx", files={}, inputs=inputs, outputs=outputs,
                   axes={**{n: a for n, a in whole.axes.items() if n in used}, ROWS: rows}, parameters=0, parity=None,
                   details=replace(details, macs=None))


def _with_lora(details: GraphDetails, takes: Sequence[str]) -> GraphDetails:
    """The details with those LoRA modules alone whose inputs a graph takes."""
    lora = details.lora
    if lora is None:
        return details
    own = {module: shape for module, shape in lora.targets.items() if f"{module}.lora_down" in takes}
    return replace(details, lora=LoraInputs(targets=own, levels=lora.levels, rank=lora.rank) if own else None)
