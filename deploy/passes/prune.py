"""`prune`: makes the denoiser smaller before export; it stays a network that diffusers builds from its config."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step, Unavailable
from deploy.pruning.planning import WEIGHTS_FILE, generates_with, generation_config, teacher_of
from runtimes.bundle.details import Pruning
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec



class Prune(Pass):
    """Blocks first, then channels, then masks. The original stays in the bundle while `recover` learns from it."""

    name: ClassVar[str] = "prune"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "torch-pruning")
    verify: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """The U-Net, when the spec asks for any pruning."""
        if not spec.prunes_denoiser:
            return Skip("the denoising network is not to be pruned")
        name, teacher = before.pipeline.denoiser.component, teacher_of(before)
        component = before.components.get(name)
        if component is None:
            raise InputError(f"there is no {name}", where="pass prune", fix="leave out --prune")
        if component.format != "safetensors":
            raise InputError(f"{name} is {component.format}, expected safetensors", where="pass prune",
                             fix="prune comes after load and before export")
        if spec.prune and util.find_spec("torch_pruning") is None:
            return Unavailable("torch-pruning is not installed", "pass prune", "pip install 'ldm-deploy[prune]'")
        config = {"prune": spec.prune, "method": spec.prune_method, "widths": spec.prune_widths,
                  "blocks": spec.prune_blocks, "mask": spec.mask, **generation_config(before, spec)}
        generated = spec.prune and (spec.prune_method == "taylor" or spec.prune_widths == "sensitivity")
        components = {**before.components, name: replace(component, files={}, file=f"components/{name}/{WEIGHTS_FILE}")}
        reads: dict[str, tuple[str, ...]] = {name: generates_with(before) if generated else (name,)}
        if spec.recover:
            components[teacher] = replace(component, files={}, file=_moved(component, component.file, teacher))
            reads[teacher] = (name,)
        step = Step(self.name, self.version, config, reads, replace(before, components=components), _summary(spec),
                    provisional=spec.recover > 0)
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Prune the network, or link the original for its recovery."""
        planned = step.after.components[name]
        folder = out / "components" / name
        folder.mkdir(parents=True)
        if name == teacher_of(source.manifest):
            original = source.component(source.manifest.pipeline.denoiser.component)
            for file in original.files:
                link_or_copy(source.path / file, out / _moved(original, file, name))
            return replace(planned, files=records_below(folder, out))
        from deploy.pruning.shrink.prune_network import prune_denoiser, size_of, write_network

        network, found = prune_denoiser(source, name, step.config)
        write_network(network, folder / WEIGHTS_FILE, planned.precision)
        return replace(planned, files=records_below(folder, out), parameters=size_of(network),
                       details=replace(planned.details, pruning=from_json(Pruning, found, name)))


def _moved(component: Component, file: str, name: str) -> str:
    """Where a file of a component lies under another name of it."""
    return f"components/{name}/{PurePosixPath(file).relative_to(PurePosixPath(component.file).parent)}"


def _summary(spec: BuildSpec) -> str:
    parts = []
    if spec.prune_blocks != "none":
        parts.append(f"blocks: BK-SDM {spec.prune_blocks}")
    if spec.prune:
        parts.append(f"{spec.prune:.0%} of the U-Net's channels, {spec.prune_method}, {spec.prune_widths} widths")
    if spec.mask != "none":
        parts.append(f"mask: {spec.mask}")
    return "; ".join(parts)
