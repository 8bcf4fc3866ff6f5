"""`share`: the U-Net's second graph reads the weights of the first, which lie on disk once."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.layer_list import carry_layers
from deploy.core.plan import Pass, Planned, Skip, Step
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.pipeline.guidance import SHALLOW

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

WHOLE = "unet"
FOLDER, GRAPH_FILE = f"components/{WHOLE}", "shallow.onnx"
STORES = {"onnx": f"{FOLDER}/model.onnx.data", "openvino": f"{FOLDER}/model.bin"}


class Share(Pass):
    """ONNX Runtime and OpenVINO both read external weights of an ONNX graph, OpenVINO's own file among them."""

    name: ClassVar[str] = "share"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("onnx-ir",)
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """The step cache's two graphs, unless they are engines."""
        if SHALLOW not in before.components:
            return Skip("no two graphs have weights in common")
        kind = before.components[WHOLE].format
        if kind not in STORES:
            return Skip(f"{kind} holds its weights itself")
        components = {**before.components, SHALLOW: replace(before.components[SHALLOW], files={},
                                                            file=f"{FOLDER}/{GRAPH_FILE}")}
        reads: dict[str, tuple[str, ...]] = {SHALLOW: (WHOLE, SHALLOW)}
        if kind == "onnx":
            components[WHOLE] = replace(components[WHOLE], files={})
            reads = {WHOLE: (WHOLE,), **reads}
        step = Step(self.name, self.version, {"weights": STORES[kind]}, reads, replace(before, components=components),
                    f"{SHALLOW} reads the weights of {WHOLE}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Put the whole graph's weights beside it, or let the other graph refer to them."""
        from exporters.onnx.shared_weights import share_weights

        whole, planned, before = source.component(WHOLE), step.after.components[name], source.component(name)
        store = out / step.config["weights"]
        if name == WHOLE:
            _move_weights_out(source, whole, out)
            carry_layers(source, whole, out)
            return replace(planned, files=records_below(out / FOLDER, out), details=before.details)
        if step.config["weights"] in whole.files:
            link_or_copy(source.path / step.config["weights"], store)
        else:
            _move_weights_out(source, whole, out)
            (out / whole.file).unlink()
        report = share_weights(source.file(before.file), store, out / planned.file)
        carry_layers(source, before, out)
        return replace(planned, files=records_below(out, out), details={
            **before.details, "shared_weights": {"with": WHOLE, "file": step.config["weights"], **asdict(report)}})


def _move_weights_out(source: Bundle, whole: Component, out: Path) -> None:
    """The whole graph with its weights in a file of their own, as large graphs have them already."""
    from exporters.onnx.shared_weights import move_weights_out

    if STORES["onnx"] not in whole.files:
        move_weights_out(source.file(whole.file), out / whole.file)
        return
    for file in (whole.file, STORES["onnx"]):
        link_or_copy(source.path / file, out / file)
