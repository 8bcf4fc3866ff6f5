"""The known pipeline families, by the class name in model_index.json; each family is one file of data."""

from __future__ import annotations

import difflib

from exporters.families.declaration import ComponentSpec, Family
from exporters.families.latent_diffusion import TEXT_TO_IMAGE, UNCONDITIONAL
from exporters.families.stable_diffusion import STABLE_DIFFUSION
from exporters.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from runtimes.errors import InputError

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLInpaintPipeline": STABLE_DIFFUSION_XL,
    "LDMPipeline": UNCONDITIONAL,
    "LDMTextToImagePipeline": TEXT_TO_IMAGE,
}

__all__ = ["FAMILIES", "ComponentSpec", "Family", "family_of"]


def family_of(pipeline_class: str, where: str = "") -> Family:
    """The family of a pipeline class.

    Args:
        pipeline_class: `_class_name` of model_index.json.
        where: the file that names it, for the error.

    Raises:
        InputError: an unknown class; names the known ones and the nearest.
    """
    if pipeline_class in FAMILIES:
        return FAMILIES[pipeline_class]
    nearest = difflib.get_close_matches(pipeline_class, FAMILIES, n=1, cutoff=0.6)
    hint = f"nearest: {nearest[0]}; " if nearest else ""
    raise InputError(
        f"unknown pipeline class {pipeline_class!r}",
        where=where,
        fix=f"{hint}known: {', '.join(sorted(FAMILIES))}",
    )
