"""`prune-vae`: makes the autoencoder narrower before export, and has it learn from the original; diffusers loads it."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step, Unavailable
from deploy.pruning.planning import WEIGHTS_FILE, generates_with, generation_config
from deploy.pruning.shrink.widths import AUTOENCODER
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec


class PruneVae(Pass):
    """Both halves to the same widths, each with its own result. Comes before `prune`: the original U-Net generates."""

    name: ClassVar[str] = "prune-vae"
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "torch-pruning")
    verify: ClassVar[bool] = True
    changes_network: ClassVar[bool] = True
    reads_pipeline: ClassVar[bool] = True

    def plan(self, before: Manifest, spec: BuildSpec) -> Planned:
        """Encoder and decoder, when the spec asks for it."""
        if not spec.prune_vae:
            return Skip("the autoencoder keeps its channels")
        generated = spec.prune_method == "taylor" or spec.recover > 0
        components, roles = dict(before.components), before.pipeline
        halves = roles.codec.encoder.component, roles.codec.decoder.component
        readers = generates_with(before)
        for half in halves:
            component = before.components[half]
            if component.format != "safetensors":
                raise InputError(f"{half} is {component.format}, expected safetensors", where="pass prune-vae",
                                 fix="prune-vae comes after load and before export")
            if component.class_name != AUTOENCODER:
                raise InputError(f"the autoencoder is {component.class_name}, which cannot be pruned",
                                 where="pass prune-vae", fix=f"leave out --prune-vae: it can prune {AUTOENCODER} only")
            components[half] = replace(component, files={}, file=f"components/{half}/{WEIGHTS_FILE}")
        if generated and (absent := [name for name in readers if name not in before.components]):
            raise InputError(f"there is no {absent[0]} to generate with", where="pass prune-vae",
                             fix="prune it with --prune-method l2 and without --recover")
        if util.find_spec("torch_pruning") is None:
            return Unavailable("torch-pruning is not installed", "pass prune-vae", "pip install 'ldm-deploy[prune]'")
        config = {"prune": spec.prune_vae, "method": spec.prune_method, "steps": spec.recover,
                  **generation_config(before, spec)}
        learns = f", {spec.recover} steps of distillation for each half" if spec.recover else ""
        reads = {half: (half, *readers) if generated else (half,) for half in halves}
        step = Step(self.name, self.version, config, reads, replace(before, components=components),
                    f"{spec.prune_vae:.0%} of the autoencoder's channels, {spec.prune_method}{learns}")
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Prune the autoencoder, let this half of it learn; what was learned before an interruption is gone on from."""
        from deploy.pruning.narrow_autoencoder import prune_half
        from deploy.pruning.shrink.prune_network import size_of, write_network
        from exporters.source.networks import torch_component

        planned, folder = step.after.components[name], out / "components" / name
        folder.mkdir(parents=True)
        network, pruning, recovery = prune_half(source, name, step.config)
        write_network(network, folder / WEIGHTS_FILE, planned.precision)
        return replace(planned, files=records_below(folder, out),
                       parameters=size_of(torch_component(source.manifest.pipeline.role(name), network)),
                       details=replace(planned.details, pruning=pruning, recovery=recovery))
