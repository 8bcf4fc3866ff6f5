"""`generate`: from command-line values to image files. Needs the base dependencies only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.bench import presets
from deploy.bench.presets import Setting
from deploy.cli import console
from deploy.core.image_files import save_array, save_images, save_preview
from runtimes.bundle.folder import check_file
from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.codec.safety_checker import SAFETY_CHECKER
from runtimes.errors import InputError
from runtimes.pipeline.aspect_ratios import parse_aspect
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.device import Device
from runtimes.system.process_memory import peak_rss_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from runtimes.bundle.folder import Bundle
    from runtimes.pipeline.denoising import Step
    from runtimes.pipeline.diffusion import Pipeline

SAFETY = ("off", "report", "replace")


@dataclass(frozen=True)
class GenerateRequest:
    """The options of `generate`, unchecked."""

    bundle: Path
    prompts: tuple[str, ...]
    prompts_file: Path | None
    negative: str | None
    image: Path | None
    mask: Path | None
    strength: float | None
    steps: int | None
    quality: str
    budget_ms: float | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: str
    part: str
    weighting: bool
    long_prompts: bool
    cache_interval: int | None
    aspect: str
    memory_budget: str
    tile: int | None
    seed: int
    count: int
    scheduler: str | None
    height: int | None
    width: int | None
    latents: Path | None
    save_latents: Path | None
    safety: str
    grid: int
    preview: Path | None
    metadata: bool
    device: Device
    threads: int
    hint: str
    pin_threads: bool
    check: bool
    lora: tuple[str, ...]
    output: Path


def prompts_of(request: GenerateRequest, *, wanted: bool = True) -> list[str]:
    """Prompts from the arguments or the file, one a line; empty lines are left out.

    Args:
        request: the options.
        wanted: whether the model reads prompts; one that does not generates one image for no prompt.

    Raises:
        InputError: both or neither given, an unreadable file, or nothing in it.
    """
    if request.prompts_file is None:
        if not request.prompts and not wanted:
            return [""]
        if not request.prompts:
            raise InputError("no prompt", where="generate", fix='give one: generate BUNDLE "a red apple"')
        return list(request.prompts)
    if request.prompts:
        raise InputError("both a prompt and --prompts are given", where="generate", fix="give one of them")
    from calibration.trajectory.prompts import read_prompts

    return list(read_prompts(request.prompts_file))


def read_latents(file: Path) -> np.ndarray[Any, Any]:
    """Initial latents from a .npy file; pickled arrays are refused.

    Raises:
        InputError: unreadable or not a plain array.
    """
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"not a plain .npy array: {error}", where=str(file)) from error
    if not isinstance(array, np.ndarray):
        raise InputError("expected a .npy file with one array", where=str(file))
    return array


def read_interval(text: str, option: str) -> tuple[float, float]:
    """Read `first:last`.

    Raises:
        InputError: not two numbers.
    """
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"{text!r} is not first:last", where=option, fix="write 0.1:0.7") from None
    return first, last


def generate_files(request: GenerateRequest) -> list[Path]:
    """Generate and write; returns the files written."""
    import runtimes

    if request.safety not in SAFETY:
        raise InputError(f"unknown {request.safety!r}", where="--safety", fix=f"one of {', '.join(SAFETY)}")
    for option, file in {"-o": request.output, "--preview": request.preview,
                         "--save-latents": request.save_latents}.items():
        check_file(file, option)
    began = time.perf_counter()
    bundle = runtimes.Bundle.open(request.bundle, trust_notes=not request.check)
    check_session(request, bundle)
    if request.safety != "off":
        bundle.component(SAFETY_CHECKER)  # refused before any work if it has none
    prompts = prompts_of(request, wanted=bool(bundle.manifest.pipeline.text_encoders))
    budget = parse_bytes(request.memory_budget, "--memory-budget") if request.memory_budget else None
    pipeline = runtimes.load(bundle, device=request.device, threads=request.threads, hint=request.hint,
                             pin_threads=request.pin_threads, memory_budget=budget,
                             lora=request.lora)
    height, width = size_of(request, pipeline)
    loaded = time.perf_counter()
    wanted = [p for p in prompts for _ in range(request.count)]
    seeds = list(range(request.seed, request.seed + len(wanted)))
    options = {**chosen_setting(request, bundle.manifest.digest).options(), **given_options(request)}
    with console.StepProgress(options["steps"]) as progress:
        def on_step(step: Step) -> None:
            progress.on_step(step)
            if request.preview is not None:
                save_preview(pipeline.preview(step.estimate), bundle.manifest.pipeline.vae_scale_factor,
                             request.preview)

        result = pipeline(wanted, negative_prompt=request.negative, seed=seeds, height=height, width=width,
                          on_step=on_step, **options)
    if request.safety != "off":
        result = checked(pipeline, result, replace=request.safety == "replace")
    if request.save_latents is not None:
        save_array(progress.latents, request.save_latents)
    texts = descriptions(request, options, bundle.manifest.digest, wanted, seeds) if request.metadata else []
    files = save_images(result, request.output, request.grid, texts)
    generated = time.perf_counter()
    console.show_generated(files, count=len(result), load_seconds=loaded - began, generate_seconds=generated - loaded,
                           peak_rss_bytes=peak_rss_bytes())
    return files


def check_session(request: GenerateRequest, bundle: Bundle) -> None:
    """Refuse what the bundle's backend would not look at.

    Raises:
        InputError: an option of another backend.
    """
    formats = {component.format for component in bundle.manifest.components.values()}
    if request.hint != "latency" and "openvino" not in formats:
        raise InputError(f"only OpenVINO takes the hint {request.hint!r}", where="--hint", fix="leave it out")
    if request.pin_threads and (request.device.kind != "cpu" or "tensorrt" in formats):
        raise InputError("threads are pinned on a CPU only", where="--pin-threads", fix="leave it out")


def checked(pipeline: Pipeline, images: list[Image], *, replace: bool) -> list[Image]:
    """Say which images the bundle's safety checker flags; black images in their place if they are to be replaced.

    Raises:
        InputError: the bundle has no safety checker.
    """
    from PIL import Image as PillowImage

    flagged = pipeline.flagged(images)
    if any(flagged):
        numbers = ", ".join(str(number) for number, flag in enumerate(flagged, 1) if flag)
        console.say(f"flagged by the safety checker{' and replaced' if replace else ''}: {numbers} of {len(images)}")
    return [PillowImage.new("RGB", image.size) if flag and replace else image
            for image, flag in zip(images, flagged, strict=True)]


def size_of(request: GenerateRequest, pipeline: Pipeline) -> tuple[int | None, int | None]:
    """Height and width as given, or as --aspect stands for them.

    Raises:
        InputError: both are given, or it is no aspect ratio.
    """
    if not request.aspect:
        return request.height, request.width
    if request.height is not None or request.width is not None:
        raise InputError("both --aspect and --height or --width are given", where="generate", fix="give one of them")
    return pipeline.size_of(parse_aspect(request.aspect))


def chosen_setting(request: GenerateRequest, digest: str) -> Setting:
    """What --quality or --budget-ms stand for, else the defaults.

    Raises:
        InputError: both are given, or nothing is fast enough.
        UnavailableError: the bundle was not measured on this machine.
    """
    if request.quality and request.budget_ms is not None:
        raise InputError("both --quality and --budget-ms are given", where="generate", fix="give one of them")
    if request.quality:
        return presets.preset(request.quality, presets.load(digest)).setting
    if request.budget_ms is not None:
        return presets.within(request.budget_ms, presets.load(digest)).setting
    return Setting(DEFAULT_STEPS)


def given_options(request: GenerateRequest) -> dict[str, Any]:
    """The pipeline's options that are given, without those that a preset or its own defaults stand in for."""
    options: dict[str, Any] = {
        "guidance_rescale": request.guidance_rescale, "part": read_interval(request.part, "--part"),
        "weighting": request.weighting, "long_prompts": request.long_prompts, "mask": request.mask,
        "tile": request.tile, "image": request.image, "strength": request.strength,
    }
    if request.strength is not None and request.image is None:
        raise InputError("a strength without an image", where="--strength", fix="give --image, or leave it out")
    if request.guidance_interval:
        options["guidance_interval"] = read_interval(request.guidance_interval, "--guidance-interval")
    if request.latents is not None:
        options["latents"] = read_latents(request.latents)
    for name in ("steps", "scheduler", "guidance_scale", "cache_interval"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    return options


def descriptions(
    request: GenerateRequest, options: Mapping[str, Any], digest: str, prompts: list[str], seeds: list[int]
) -> list[dict[str, str]]:
    """What each image's PNG says about how it was made; what is not said was left to its default."""
    common = {"negative_prompt": request.negative or "", "bundle": digest, "software": "ldm-deploy",
              "lora": ", ".join(Path(option).name for option in request.lora)}
    common |= {name: str(options[name] or "") for name in ("steps", "scheduler", "guidance_scale") if name in options}
    return [{"prompt": prompt, "seed": str(seed), **{k: v for k, v in common.items() if v}}
            for prompt, seed in zip(prompts, seeds, strict=True)]
