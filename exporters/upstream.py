"""diffusers' own pipeline over a model folder, with networks on the meta device: what it corrects when it loads, and
the defaults of its call. Nothing of the weights is read.

Imports torch and diffusers; import it inside the function that needs it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers

from exporters.modules import empty_module
from exporters.quiet import quiet
from exporters.source import Source
from runtimes.errors import InputError

MODES = ("text", "image", "mask")


def upstream_class(source: Source, mode: str) -> Any | None:
    """diffusers' pipeline class for what is asked of a model, as `AutoPipelineFor...` chooses it.

    Args:
        source: the model; its `pipeline_class` decides.
        mode: "text", "image" (image to image) or "mask" (inpainting).

    Returns:
        the class; None where diffusers has none that runs this model in that mode: latent diffusion of 2021 knows
        text alone, a U-Net that takes a mask knows inpainting alone, and XL's refiner wants an image.
    """
    own, by_mode = own_class(source), _classes()
    kind = next((kind for classes in by_mode.values() for kind, cls in classes.items() if cls is own), None)
    if kind is None:
        return own if mode == "text" else None
    unet, latents = source.components["unet"].config, source.components["vae"].config["latent_channels"]
    if mode != "mask" and unet["in_channels"] != latents:
        return None
    if mode == "text" and source.options.get("requires_aesthetics_score"):
        return None
    return by_mode[mode].get(kind)


def own_class(source: Source) -> Any:
    """The class that model_index.json names."""
    with quiet():  # importing pipelines imports transformers, which talks
        return getattr(diffusers, source.pipeline_class)


def _classes() -> Mapping[str, Mapping[str, Any]]:
    """diffusers' classes by mode and then by kind of model."""
    with quiet():
        from diffusers.pipelines import auto_pipeline

    return {"text": auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
            "image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            "mask": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING}


def upstream_pipeline(source: Source, mode: str, *, read: Collection[str] = (), torch_dtype: Any = None,
                      variant: str = "", **components: Any) -> Any:
    """diffusers' pipeline for a mode, made by its own `from_pretrained`: it chooses and loads scheduler and tokenizers,
    and corrects configs as it does for every user of the folder.

    Args:
        source: the model.
        mode: as of `upstream_class`; where diffusers has no class for it, the folder's own class.
        read: networks that diffusers loads with their weights, from the files that it chooses; never a pickle.
        torch_dtype, variant: of those, as `from_pretrained` takes them.
        components: objects by their name in model_index.json, in place of networks on the meta device and of what
            would be loaded; None leaves one out.

    Returns:
        the pipeline in eval mode, without progress bar, safety checker and watermark.

    Raises:
        InputError: diffusers refuses the folder.
    """
    kind = upstream_class(source, mode) or own_class(source)
    given = set(inspect.signature(kind.__init__).parameters)
    names = {name: copy.copy(empty_module(c.folder, c.library, c.class_name)[0])
             for name, c in source.components.items() if name in given and name not in components and name not in read}
    unused = {name: None for name in source.ignored if name in given}
    switches = {"requires_safety_checker": False, "add_watermarker": False}
    arguments = {**unused, **names, **{k: v for k, v in switches.items() if k in given}, **components}
    try:
        with _unwarned():
            pipe = kind.from_pretrained(str(source.path), local_files_only=True, use_safetensors=True,
                                        torch_dtype=torch_dtype, variant=variant or None, **arguments)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"diffusers' {kind.__name__} refuses it: {type(error).__name__}: "
                         f"{str(error).partition(chr(10))[0]:.300}", where=str(source.path),
                         fix="load it with diffusers, correct what it names and save it again") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _unwarned() -> Iterator[None]:
    """diffusers warns of each outdated key that it corrects, and shows a bar for every component."""
    from diffusers.utils import logging
    from transformers.utils import logging as of_encoders

    shown = [module for module in (logging, of_encoders) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in shown:
            module.enable_progress_bar()
