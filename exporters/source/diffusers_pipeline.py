"""Loads diffusers' own pipeline over a model folder, to learn what it corrects in the configs and its call's defaults.

Its networks are on the meta device: no weight is read.

Imports torch and diffusers; import it inside the function that needs it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers

from exporters.quiet import one_line, quiet
from exporters.source.config_keys import check_network, check_pipeline
from exporters.source.model_folder import MODEL_INDEX, ComponentSource, Source, read_json
from exporters.source.networks import empty_network
from runtimes.bundle.roles import ModeFacts
from runtimes.errors import InputError
from runtimes.schedulers import DEFAULTED

MODES = ("text", "image", "mask")


def upstream_class(source: Source, mode: str) -> Any | None:
    """diffusers' pipeline class for what is asked of a model, as `AutoPipelineFor...` chooses it.

    Args:
        source: the model; its `pipeline_class` decides.
        mode: "text", "image" (image to image) or "mask" (inpainting).

    Returns:
        the class; None where diffusers has none that runs this model in that mode: latent diffusion of 2021 knows
        text alone, a U-Net that takes a mask knows inpainting alone, XL's refiner wants an image, and a U-Net whose
        sample_size is a pair stops Stable Diffusion's classes for images.
    """
    own, by_mode = own_class(source), _classes()
    kind = next((kind for classes in by_mode.values() for kind, cls in classes.items() if cls is own), None)
    if kind is None:
        return own if mode == "text" else None
    unet, vae = source.components["unet"].config, source.components["vae"].config
    if mode != "mask" and unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        return None
    if mode != "text" and kind == "stable-diffusion" and not isinstance(unet.get("sample_size"), int):
        return None  # these two classes compare it with a number (`is_unet_sample_size_less_64`)
    if mode == "text" and own is not by_mode["text"][kind] and source.options.get("requires_aesthetics_score"):
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
    """diffusers' pipeline for a mode, made by its own `from_pretrained`.

    It chooses and loads scheduler and tokenizers, and corrects configs as it does for every user of the folder.

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
    networks = {name: network(component) for name, component in source.components.items()
                if name in given and name not in components and name not in read}
    switches = {**dict.fromkeys(source.ignored), "requires_safety_checker": False, "add_watermarker": False}
    arguments = {**{k: v for k, v in switches.items() if k in given}, **networks, **components}
    try:
        with unwarned():
            pipe = kind.from_pretrained(str(source.path), local_files_only=True, use_safetensors=True,
                                        torch_dtype=torch_dtype, variant=variant or None, **arguments)
    except Exception as error:  # whatever it raises over a folder: its schedulers have NotImplementedError, IndexError
        raise InputError(f"diffusers' {kind.__name__} refuses it: {type(error).__name__}: {one_line(error)}",
                         where=str(source.path),
                         fix="load it with diffusers, correct what it names and save it again") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(component: ComponentSource) -> Any:
    """The network on the meta device, from its config alone."""
    with quiet():
        return empty_network(component.folder, component.library, component.class_name, component.config)


def as_loaded(source: Source) -> Source:
    """The source as diffusers loads it: every config with its class's own defaults and the pipeline's corrections.

    What is read back from diffusers' pipelines: the U-Net's config (`sample_size` of old files), the pipeline's options
    (`force_zeros_for_empty_prompt`, `requires_aesthetics_score`), the scheduler's class and config, and for each mode
    the defaults of the class's `__call__` and what it corrects in the scheduler's config.

    Args:
        source: as `open_source` reads it.

    Raises:
        InputError: diffusers refuses it.
    """
    networks = {name: network(component) for name, component in source.components.items()}
    _check_keys(source, networks)
    complete = {name: replace(source.components[name], config=_config(module)) for name, module in networks.items()}
    source = replace(source, components=complete)
    tokenizers = dict.fromkeys(source.tokenizers)

    def loaded(mode: str) -> Any:
        shared = {name: copy.copy(module) for name, module in networks.items()}  # a correction stays in its pipeline
        components: dict[str, Any] = {**shared, **tokenizers}
        return upstream_pipeline(source, mode, **components)

    pipes, refused = {}, InputError("diffusers has no pipeline that runs it", where=str(source.path),
                                    fix="check model_index.json and the U-Net's in_channels")
    for mode in (mode for mode in MODES if upstream_class(source, mode)):
        try:
            pipes[mode] = loaded(mode)
        except InputError as error:  # a class may ask for more than those of the other modes do
            refused = error
    if not pipes:
        raise refused
    main = pipes.get("text") or next(iter(pipes.values()))
    scheduler = _scheduler(main)
    components = {**complete, "unet": replace(complete["unet"], config=_config(main.unet))}
    own = next((pipe for pipe in pipes.values() if type(pipe) is own_class(source)), main)
    options = {key: value for key, value in own.config.items()
               if isinstance(value, bool | int | float | str | None) and not key.startswith("_")}
    return replace(source, components=components, options=options, scheduler_class=scheduler["_class_name"],
                   scheduler_config=scheduler,
                   modes={mode: _mode(pipe, mode, scheduler) for mode, pipe in pipes.items()},
                   notes=_corrections(source, pipes, complete["unet"].config))


def _check_keys(source: Source, networks: Mapping[str, Any]) -> None:
    """Refuse a config that asks for something that neither its class nor anything here does."""
    for name, module in networks.items():
        component, config = source.components[name], module.config
        known = set(inspect.signature(type(module).__init__).parameters) if isinstance(config, dict) else set(
            type(config)().to_dict())
        check_network(component.class_name, source.family, component.config, known,
                      component.folder / "config.json")
    classes = [cls for cls in (own_class(source), *(upstream_class(source, mode) for mode in MODES)) if cls]
    known = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    check_pipeline(source.pipeline_class, read_json(source.path / MODEL_INDEX), known, source.path / MODEL_INDEX)


def _config(module: Any) -> dict[str, Any]:
    """A network's whole config: the file's keys and its class's defaults for the others."""
    config = module.config
    found: dict[str, Any] = dict(config) if isinstance(config, dict) else config.to_dict()
    return found


def _corrections(source: Source, pipes: Mapping[str, Any], unet: Mapping[str, Any]) -> tuple[str, ...]:
    """What the pipelines made of their configs when they were loaded, one line each."""
    found: dict[str, list[str]] = {}
    for mode, pipe in pipes.items():
        with unwarned():
            loaded = type(pipe.scheduler).from_pretrained(str(source.path), subfolder="scheduler").config
        for what, before, after in (("the scheduler", loaded, pipe.scheduler.config),
                                    ("the U-Net", unet, pipe.unet.config)):
            for key, value in after.items():
                if not key.startswith("_") and before.get(key) != value:
                    found.setdefault(f"{key} of {what}, {before.get(key)} -> {value}", []).append(mode)
    notes = [f"corrected as diffusers does: {what} ({', '.join(modes)})" for what, modes in found.items()]
    named = source.scheduler_config.get("_class_name")
    if named != source.scheduler_class and named is not None:
        notes.append(f"the sampler is {source.scheduler_class}, of model_index.json; scheduler_config.json is "
                     f"{named}'s")
    return tuple(notes)


def _scheduler(pipe: Any) -> dict[str, Any]:
    """The scheduler's config in the pipeline, under the name of the class that runs, as JSON."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in pipe.scheduler.config.items()}
    defaulted = sorted(config.get(DEFAULTED, ()))
    return {**config, DEFAULTED: defaulted, "_class_name": type(pipe.scheduler).__name__}


def _mode(pipe: Any, mode: str, main: Mapping[str, Any]) -> ModeFacts:
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}
    config = _scheduler(pipe)
    # `from_config` carries over to another class what the file held, not what was a default
    differing = {key: value for key, value in config.items() if main.get(key) != value}
    return ModeFacts(type(pipe).__name__, guidance_scale=float(defaults.get("guidance_scale", 1.0)),
                     strength=float(defaults.get("strength", 1.0)), scheduler=differing)


@contextmanager
def unwarned() -> Iterator[None]:
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
