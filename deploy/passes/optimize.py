"""`optimize`: folds, fuses and cleans the graphs for the target, by rewrites that were measured to be faster there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Step, require_onnx
from runtimes.bundle.details import GraphDetails, Optimization
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


class Optimize(Pass):
    """Target-independent folding, then the fusions that `exporters.onnx.optimize_graph` found to pay on the target."""

    name: ClassVar[str] = "optimize"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx-ir", "onnxruntime")
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Every ONNX component; the structure stays, the nodes change."""
        require_onnx(before, self.name, "optimize comes after export")
        config = {"target": spec.graph_target}
        components = {n: replace(c, files={}) for n, c in before.components.items()}
        step = Step(self.name, self.version, config, {n: (n,) for n in components},
                    replace(before, components=components), f"fold and fuse for {spec.graph_target}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Optimize one graph; what changed is kept in the component's details."""
        from exporters.onnx.optimize_graph import optimize_onnx

        planned = step.after.components[name]
        folder = out / "components" / name
        folder.mkdir(parents=True)
        report = optimize_onnx(source.file(planned.file), folder / "model.onnx",
                               source.manifest.pipeline.role(name), step.config["target"], where=name)
        found = from_json(Optimization, report.to_json(), name)
        return replace(planned, files=records_below(folder, out),
                       details=replace(source.component(name).details_as(GraphDetails), optimization=found))
