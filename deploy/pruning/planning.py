"""What the passes of pruning share before anything is loaded: names of networks and files, settings of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy.core.spec import REFERENCE
from deploy.model.source_bundle import VAE_HALVES
from deploy.reference_models import GUIDANCE_SCALE, subject_names
from runtimes.bundle.manifest import Manifest

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

DENOISER, TEACHER = "unet", "unet_teacher"
HALVES = tuple(VAE_HALVES)
GENERATES_WITH = (DENOISER, "text_encoder")
WEIGHTS_FILE = "model.safetensors"
GUIDANCE = 7.5  # what images are generated with where the model does not say: diffusers' default


def generation_config(before: Manifest, spec: BuildSpec) -> dict[str, Any]:
    """What the original is asked to generate: the user's prompts, else the reference model's, else everyday ones."""
    from deploy.parity.options import PROMPTS

    is_reference = before.source.id == REFERENCE
    prompts = spec.recover_prompts or (subject_names() if is_reference else PROMPTS)
    return {"prompts": list(prompts), "guidance_scale": GUIDANCE_SCALE if is_reference else GUIDANCE}
