"""`share`: the step cache's graph reads the weights of the denoiser's own graph, which lie on disk once."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.core.layer_list import carry_layers
from deploy.core.plan import Pass, Planned, Skip, Step
from runtimes.bundle.details import SharedWeights
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

GRAPH_FILE = "shallow.onnx"
STORES = {"onnx": "model.onnx.data", "openvino": "model.bin"}  # format -> the file of the whole graph's weights


class Share(Pass):
    """ONNX Runtime and OpenVINO both read external weights of an ONNX graph, OpenVINO's own file among them."""

    name: ClassVar[str] = "share"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("onnx-ir",)
    verify: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """The step cache's two graphs, unless they are engines."""
        whole, entry = before.pipeline.denoiser.component, before.pipeline.denoiser.shallow
        if entry is None:
            return Skip("no two graphs have weights in common")
        kind = before.components[whole].format
        if kind not in STORES:
            return Skip(f"{kind} holds its weights itself")
        shallow, folder = entry.component, f"components/{whole}"
        components = {**before.components, shallow: replace(before.components[shallow], files={},
                                                            file=f"{folder}/{GRAPH_FILE}")}
        reads: dict[str, tuple[str, ...]] = {shallow: (whole, shallow)}
        if kind == "onnx":
            components[whole] = replace(components[whole], files={})
            reads = {whole: (whole,), **reads}
        step = Step(self.name, self.version, {"weights": f"{folder}/{STORES[kind]}"}, reads,
                    replace(before, components=components), f"{shallow} reads the weights of {whole}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Put the whole graph's weights beside it, or let the other graph refer to them."""
        from exporters.onnx.shared_weights import share_weights

        denoiser = source.manifest.pipeline.denoiser.component
        whole, planned, before = source.component(denoiser), step.after.components[name], source.component(name)
        store = out / step.config["weights"]
        if name == denoiser:
            _move_weights_out(source, whole, out)
            carry_layers(source, whole, out)
            return replace(planned, files=records_below(store.parent, out), details=before.details)
        if step.config["weights"] in whole.files:
            link_or_copy(source.path / step.config["weights"], store)
        else:
            _move_weights_out(source, whole, out)
            (out / whole.file).unlink()
        report = share_weights(source.file(before.file), store, out / planned.file)
        carry_layers(source, before, out)
        shared = SharedWeights(component=denoiser, file=step.config["weights"], **asdict(report))
        details: Any = before.details  # of an ONNX graph, or of one that OpenVINO reads
        return replace(planned, files=records_below(out, out), details=replace(details, shared_weights=shared))


def _move_weights_out(source: Bundle, whole: Component, out: Path) -> None:
    """The whole graph with its weights in a file of their own, as large graphs have them already."""
    from exporters.onnx.shared_weights import move_weights_out

    store = str(PurePosixPath(whole.file).with_name(STORES["onnx"]))
    if store not in whole.files:
        move_weights_out(source.file(whole.file), out / whole.file)
        return
    for file in (whole.file, store):
        link_or_copy(source.path / file, out / file)
