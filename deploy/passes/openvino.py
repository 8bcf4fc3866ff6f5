"""`openvino`: converts each ONNX graph to OpenVINO's `.xml` and `.bin`."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.layer_list import carry_layers
from deploy.core.plan import Pass, Planned, Skip, Step, Unavailable, require_onnx
from runtimes.bundle.details import OpenVinoDetails
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.bundle.roles import Role

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


class OpenVino(Pass):
    """OpenVINO's conversion; its own graph optimization runs at load time, for the CPU that is there."""

    name: ClassVar[str] = "openvino"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("openvino",)
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every component, when the target is openvino."""
        if spec.target != "openvino":
            return Skip(f"the target is {spec.target}")
        require_onnx(before, self.name, "it comes after everything that works on graphs")
        if util.find_spec("openvino") is None:
            return Unavailable("openvino is not installed", "target openvino", "pip install 'ldm-deploy[openvino]'")
        role = before.pipeline.role
        components = {n: replace(c, format="openvino", files={},
                                 file=c.file if role(n) is Role.SHALLOW else f"components/{n}/model.xml")
                      for n, c in before.components.items()}
        step = Step(self.name, self.version, {}, {n: (n,) for n in components},
                    replace(before, components=components), "OpenVINO's own files")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Convert one graph. The denoiser's second one stays ONNX, which OpenVINO reads too: `share` makes it read the
        first one's weights."""
        from exporters.openvino.openvino_files import convert_openvino
        from runtimes.adapters.lora_inputs import with_inputs

        before, planned = source.component(name), step.after.components[name]
        folder = out / "components" / name
        if source.manifest.pipeline.role(name) is Role.SHALLOW:
            for file in before.files:
                link_or_copy(source.path / file, out / file)
            return replace(planned, files=before.files, details=before.details.become(OpenVinoDetails))
        report = convert_openvino(source.file(before.file), folder / "model.xml", with_inputs(before).inputs,
                                  before.outputs)
        carry_layers(source, before, out)
        return replace(planned, files=records_below(folder, out),
                       details=before.details.become(OpenVinoDetails, **report.to_json()))
