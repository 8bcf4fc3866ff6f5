"""`prune`: the denoising network made smaller before export; it stays one that diffusers builds from its config."""

from __future__ import annotations

from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy.core.plan import Pass, Planned, Skip, Step, Unavailable
from deploy.core.spec import REFERENCE
from deploy.reference_models import GUIDANCE_SCALE, subject_names
from runtimes.bundle.folder import Bundle, link_or_copy, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

NAME, TEACHER = "unet", "unet_teacher"
WEIGHTS_FILE = "model.safetensors"
GUIDANCE = 7.5  # what images are generated with where the model does not say: diffusers' default


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
        component = before.components.get(NAME)
        if component is None:
            raise InputError(f"there is no {NAME}", where="pass prune", fix="leave out --prune")
        if component.format != "safetensors":
            raise InputError(f"{NAME} is {component.format}, expected safetensors", where="pass prune",
                             fix="prune comes after load and before export")
        if spec.prune and util.find_spec("torch_pruning") is None:
            return Unavailable("torch-pruning is not installed", "pass prune", "pip install 'ldm-deploy[prune]'")
        config = {"prune": spec.prune, "method": spec.prune_method, "widths": spec.prune_widths,
                  "blocks": spec.prune_blocks, "mask": spec.mask, **generation_config(before, spec)}
        generated = spec.prune and (spec.prune_method == "taylor" or spec.prune_widths == "sensitivity")
        components = {**before.components, NAME: replace(component, files={}, file=f"components/{NAME}/{WEIGHTS_FILE}")}
        reads: dict[str, tuple[str, ...]] = {NAME: (NAME, "text_encoder") if generated else (NAME,)}
        if spec.recover:
            components[TEACHER] = replace(component, files={},
                                          file=component.file.replace(f"components/{NAME}/", f"components/{TEACHER}/"))
            reads[TEACHER] = (NAME,)
        step = Step(self.name, self.version, config, reads, replace(before, components=components), _summary(spec),
                    provisional=spec.recover > 0)
        return step.recorded()

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        """Prune the network, or link the original for its recovery."""
        planned = step.after.components[name]
        folder = out / "components" / name
        folder.mkdir(parents=True)
        if name == TEACHER:
            for file in source.component(NAME).files:
                link_or_copy(source.path / file, out / file.replace(f"components/{NAME}/", f"components/{TEACHER}/"))
            return replace(planned, files=records_below(folder, out))
        from deploy.pruning.shrink.prune_network import prune_unet, size_of, write_network

        network, details = prune_unet(source, NAME, step.config)
        write_network(network, folder / WEIGHTS_FILE, planned.precision)
        return replace(planned, files=records_below(folder, out), parameters=size_of(network),
                       details={**planned.details, "pruning": details})


def generation_config(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What the original is asked to generate: the user's prompts, else the reference model's, else everyday ones."""
    from deploy.parity.options import PROMPTS

    is_reference = before.source.id == REFERENCE
    prompts = spec.recover_prompts or (subject_names() if is_reference else PROMPTS)
    return {"prompts": list(prompts), "guidance_scale": GUIDANCE_SCALE if is_reference else GUIDANCE}


def _summary(spec: BuildSpec) -> str:
    parts = []
    if spec.prune_blocks != "none":
        parts.append(f"blocks: BK-SDM {spec.prune_blocks}")
    if spec.prune:
        parts.append(f"{spec.prune:.0%} of the U-Net's channels, {spec.prune_method}, {spec.prune_widths} widths")
    if spec.mask != "none":
        parts.append(f"mask: {spec.mask}")
    return "; ".join(parts)
