"""`recover`: retrains a pruned network to answer like the original; then the original is removed from the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step
from deploy.core.pruning_options import TRAJECTORIES
from deploy.pruning.planning import WEIGHTS_FILE, generation_config, teacher_of
from runtimes.bundle.details import Recovery
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest, from_json
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


class Recover(Pass):
    """Distillation along the original's own trajectories (deploy.pruning.recovery.distill)."""

    name: ClassVar[str] = "recover"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers")
    verify: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """The pruned U-Net, when the spec gives it steps to learn in."""
        if not (spec.recover and spec.prunes_denoiser):
            return Skip("no recovery of the denoising network was asked for")
        name, teacher = before.pipeline.denoiser.component, teacher_of(before)
        if teacher not in before.components or before.components[name].format != "safetensors":
            raise InputError("there is no original to learn from", where="pass recover",
                             fix="recover comes right after prune")
        fewer = {"batch": spec.recover_batch} if spec.recover_batch < TRAJECTORIES else {}
        config = {"steps": spec.recover, "keep_zeros": spec.mask != "none", **fewer, **generation_config(before, spec)}
        components = {n: c for n, c in before.components.items() if n != teacher}
        components[name] = replace(components[name], files={})
        step = Step(self.name, self.version, config, {name: (name, teacher, *before.pipeline.encoders)},
                    replace(before, components=components), f"{spec.recover} steps of distillation from the original")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Train; what was learned before an interruption is gone on from."""
        from deploy.pruning.recovery.recover_network import recover_denoiser
        from deploy.pruning.shrink.prune_network import write_network

        before, folder = source.component(name), out / "components" / name
        folder.mkdir(parents=True)
        network, found = recover_denoiser(source, name, teacher_of(source.manifest), step.config)
        write_network(network, folder / WEIGHTS_FILE, before.precision)
        return replace(before, files=records_below(folder, out),
                       details=replace(before.details, recovery=from_json(Recovery, found, name)))
