"""Declares a pipeline's safety checker as one more component: inputs, outputs and axes, no weights."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.families.declaration import ComponentSpec, config_value
from exporters.source.model_folder import Source
from runtimes.bundle.tensors import TensorSpec
from runtimes.codec.safety_checker import (
    CLIP_INPUT,
    CONCEPT_SCORES,
    PREPROCESSOR_FILE,
    SAFETY_CHECKER,
    SPECIAL_SCORES,
    Preprocessing,
)
from runtimes.errors import InputError

CLASS_NAME, CONCEPTS, SPECIAL_CONCEPTS = "StableDiffusionSafetyChecker", 17, 3  # as diffusers' class has them


def with_safety_checker(specs: Mapping[str, ComponentSpec], decoder: str, source: Source) -> dict[str, ComponentSpec]:
    """Components with `safety_checker`, which takes as many images as the decoder.

    Args:
        specs: of a family with an autoencoder.
        decoder: name of its component that decodes images.
        source: with the component safety_checker.

    Raises:
        InputError: of another class, or what its images are prepared by is missing or of another size.
    """
    from exporters.source.model_folder import read_json

    found = source.components[SAFETY_CHECKER]
    where = str(found.folder / "config.json")
    if found.class_name != CLASS_NAME:
        raise InputError(f"the safety checker is a {found.class_name}, expected {CLASS_NAME}", where=where,
                         fix="build without --safety-checker")
    vision = config_value(found.config, "vision_config", dict, where)
    side = vision.get("image_size", 224)
    file = source.path / PREPROCESSOR_FILE
    prepare = Preprocessing.from_config(read_json(file), str(file))
    if prepare.crop != (side, side):
        raise InputError(f"images are cut to {prepare.crop}, the safety checker takes {(side, side)}",
                         where=str(file), fix="copy the pipeline again")
    scores = "cosine less threshold: above 0 the concept is in the image"
    return {**specs, SAFETY_CHECKER: ComponentSpec(
        SAFETY_CHECKER, SAFETY_CHECKER,
        (TensorSpec(CLIP_INPUT, "float32", ("batch", 3, side, side), "images as CLIPImageProcessor prepares them"),),
        (TensorSpec(SPECIAL_SCORES, "float32", ("batch", SPECIAL_CONCEPTS), scores),
         TensorSpec(CONCEPT_SCORES, "float32", ("batch", CONCEPTS), scores)),
        {"batch": specs[decoder].axes["batch"]})}
