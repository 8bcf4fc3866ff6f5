"""`export`: exports every component from PyTorch to ONNX, without its weights in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Step
from runtimes.bundle.details import GraphDetails, SourceDetails
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


class Export(Pass):
    """`torch.onnx.export(dynamo=True)` with the axes that the family declares."""

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every component that is still a PyTorch network."""
        components = {}
        for name, component in before.components.items():
            if component.format != "safetensors":
                raise InputError(f"{name} is {component.format}, expected safetensors", where="pass export",
                                 fix="export comes after load and before everything that works on graphs")
            components[name] = replace(
                component, format="onnx", precision="fp32", file=f"components/{name}/model.onnx", files={},
                details=component.details.become(GraphDetails, opset=spec.opset))
        config = {"opset": spec.opset, "exporter": "torch.onnx.export(dynamo=True)"}
        step = Step(self.name, self.version, config, {n: (n,) for n in components},
                    replace(before, components=components), f"PyTorch to ONNX, opset {spec.opset}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Trace one network without its weights, which go from file to file."""
        from exporters.families import ComponentSpec
        from exporters.onnx.streaming import unread_module
        from exporters.onnx.trace import example_inputs, export_onnx
        from exporters.source.macs import count_macs
        from exporters.source.networks import torch_component

        before, planned = source.component(name), step.after.components[name]
        folder = source.file(before.file).parent
        details = before.details_as(SourceDetails)
        unread, stored = unread_module(folder, details.library, before.class_name)
        module = torch_component(source.manifest.pipeline.role(name), unread, before.gives)
        spec = ComponentSpec(name, details.source_component, before.inputs, before.outputs, before.axes)
        export_onnx(module, spec, out / "components" / name, opset=step.config["opset"], stored=stored,
                    lora=details.lora.targets if details.lora else None)
        common = {axis: a.range.opt for axis, a in before.axes.items()}
        macs = count_macs(module, example_inputs(spec, common))
        return replace(planned, files=records_below(out / "components" / name, out),
                       details=details.become(GraphDetails, opset=step.config["opset"], macs=macs))
