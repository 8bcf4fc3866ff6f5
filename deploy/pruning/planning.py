"""What the passes of pruning share before anything is loaded: names of networks and files, settings of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy.core.spec import REFERENCE
from deploy.reference_models import GUIDANCE_SCALE, subject_names
from runtimes.bundle.manifest import Manifest

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

WEIGHTS_FILE = "model.safetensors"
GUIDANCE = 7.5  # what images are generated with where the model does not say: diffusers' default


def teacher_of(manifest: Manifest) -> str:
    """What the original denoiser is called while a pruned one learns from it."""
    return f"{manifest.pipeline.denoiser.component}_teacher"


def generates_with(manifest: Manifest) -> tuple[str, ...]:
    """The networks that decide what the original generates: the denoiser, and whatever reads the prompt."""
    return (manifest.pipeline.denoiser.component, *manifest.pipeline.encoders)


def generation_config(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What the original is asked to generate: the user's prompts, else the reference model's, else everyday ones."""
    from deploy.parity.comparison_options import PROMPTS

    is_reference = before.source.id == REFERENCE
    prompts = spec.recover_prompts or (subject_names() if is_reference else PROMPTS)
    return {"prompts": list(prompts), "guidance_scale": GUIDANCE_SCALE if is_reference else GUIDANCE}
