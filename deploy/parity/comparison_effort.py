"""Chooses how much is compared: everything where that takes a minute, less where it would take hours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deploy.parity.comparison_options import ParityOptions
from deploy.parity.reference.planned_shapes import halved_sizes
from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import Roles

# "auto" is one of the next two; "components" generates no images; "no" compares nothing.
LEVELS = ("auto", "full", "quick", "components", "no")
LIMIT_MACS = 5e12  # a minute or two on two cores
# Multiply-accumulates of one call by weight and latent position, which is all that is known before anything is loaded.
# Counted (source.macs) are 0.096 for the U-Net of Stable Diffusion 1.5, and 6.1 for its decoder, whose layers work
# on up to 64 pixels a position.
DENOISER_MACS, DECODER_MACS = 0.1, 6.0
QUICK_STEPS, RECORDING_STEPS = 4, 3


@dataclass(frozen=True)
class Effort:
    """What a comparison does.

    Attributes:
        level: one of `LEVELS`, not "auto".
        options: reduced to it.
        why: what made it less than everything, for the user; empty for "full".
    """

    level: str
    options: ParityOptions
    why: str = ""

    @property
    def text(self) -> str:
        """One line for a person."""
        o, why = self.options, f" ({self.why})" if self.why else ""
        small = "next to their smallest sizes and once, with the smallest batch, at the common one"
        sizes = small if o.small else "at several sizes"
        generated = "no images" if self.level == "components" else (
            f"images of {len(o.prompts)} prompt{'s' * (len(o.prompts) > 1)} by {' and '.join(o.schedulers)}, "
            f"{o.steps} steps" + (f", {o.width}x{o.height}" if o.height else ""))
        return f"{self.level}{why}: components {sizes}; {generated}"

    def to_json(self) -> dict[str, Any]:
        """What the manifest and `verify --json` say about it."""
        o = self.options
        said: dict[str, Any] = {"level": self.level, "text": self.text, "small": o.small,
                                "recording_steps": o.recording_steps}
        return said if self.level == "components" else said | {
            "prompts": len(o.prompts), "schedulers": list(o.schedulers), "steps": o.steps, "height": o.height,
            "width": o.width}


def choose(asked: str, options: ParityOptions, components: Mapping[str, Component], roles: Roles) -> Effort:
    """The effort that was asked for; for "auto", everything if its estimated cost is below `LIMIT_MACS`, else "quick".

    Args:
        asked: one of `LEVELS` but "no".
        options: of a full comparison.
        components: of the source; their ranges say how small an image may be.
        roles: of the pipeline.
    """
    sizes = halved_sizes(components, roles)
    whole = image_macs(options, components, roles, sizes[0])
    large = whole > LIMIT_MACS
    level = asked if asked != "auto" else "quick" if large else "full"
    if level == "full":
        return Effort(level, options)
    why = f"all of it would take an estimated {whole / 1e12:.0f} T multiply-accumulates" if large else "asked for"
    if large:
        options = replace(options, small=True, recording_steps=RECORDING_STEPS)
    if level == "components":
        return Effort(level, options, why)
    quick = replace(options, prompts=options.prompts[:1], schedulers=options.schedulers[:1], steps=QUICK_STEPS,
                    retrieval_prompts=())
    rows, columns = next((s for s in sizes if image_macs(quick, components, roles, s) <= LIMIT_MACS), sizes[-1])
    factor = roles.codec.factor
    return Effort(level, replace(quick, height=rows * factor, width=columns * factor), why)


def image_macs(options: ParityOptions, components: Mapping[str, Component], roles: Roles, latents: tuple[int, int],
               ) -> float:
    """Estimated multiply-accumulates of generating every prompt with every sampler under guidance, by both sides."""
    def of(name: str, factor: float) -> float:
        return factor * components[name].parameters * latents[0] * latents[1] if name in components else 0.0

    generated = len(options.prompts) * len(options.schedulers)
    steps, image = of(roles.denoiser.component, DENOISER_MACS), of(roles.codec.decoder.component, DECODER_MACS)
    return 2 * generated * (2 * options.steps * steps + image)
