"""`generate`: from command-line values to image files. Needs the base dependencies only.

What is asked of a pipeline is `runtimes.Request`, whose fields are options, too; `GenerateOptions` holds all others.
"""
# ruff: noqa: RUF009 - `option` is dataclasses.field with metadata

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cli import console
from deploy.cli.derived_options import Option, from_dataclass
from deploy.core.image_files import save_array, save_images, save_preview
from runtimes.bundle.folder import check_file
from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.codec.safety_checker import SAFETY_CHECKER
from runtimes.errors import InputError
from runtimes.inputs import image_texts
from runtimes.inputs import quality_presets as presets
from runtimes.inputs.quality_presets import Setting
from runtimes.inputs.request import Request
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.device import CPU, Device
from runtimes.system.process_memory import peak_rss_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from runtimes.bundle.folder import Bundle
    from runtimes.pipeline.diffusion import Pipeline
    from runtimes.pipeline.job import Step

SAFETY = ("off", "report", "replace")


def option(value: Any, help: str, /, **said: Any) -> Any:
    """A field of `GenerateOptions`; `said` are attributes of its `Option`."""
    return field(default=value, metadata={"help": help, **said})


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `generate` that ask nothing of the pipeline.

    Raises:
        InputError: none of the choices, or below the least.
    """

    bundle: Path = field(metadata={"help": "folder that `build` wrote", "argument": "BUNDLE", "required": True})
    prompts: Path | None = option(None, "file with one prompt a line, in place of PROMPT")
    quality: str = option("", "steps, scheduler, caching and guided steps as `tradeoffs`, to be run before, measured "
                          "of the bundle on this machine; options that are given win", choices=presets.QUALITIES,
                          default="none")
    budget_ms: float | None = option(None, "milliseconds for an image: the most accurate setting that `tradeoffs` "
                                     "measured within them", above=0)
    save_latents: Path | None = option(None, ".npy file to write: the latents of the last step")
    safety: str = option("off", "run the bundle's safety checker, and report what it flags or replace it by black",
                         choices=SAFETY)
    grid: int = option(0, "columns of one sheet with all images; 0 writes a file for each", least=0)
    preview: Path | None = option(None, "PNG file, rewritten after each step: what will come of it")
    metadata: bool = option(True, "write prompt, seed and the bundle's hash into the PNG file",
                            flags=("--metadata/--no-metadata",))
    lora: tuple[str, ...] = option((), "LoRA in place of the bundle's, FILE or FILE:SCALE, of a bundle built with "
                                   "--lora-mode swap; may be given again")
    device: Device = option(CPU, "where the bundle runs: cpu, cuda, tensorrt or tensorrt-rtx; with OpenVINO cpu, gpu, "
                            "npu or auto; the second GPU is cuda:1", type=str, default="cpu")
    threads: int = option(0, "CPU threads, 0 being one for each core", least=0)
    hint: str = option("latency", "OpenVINO only: all cores for each call, or calls that run side by side",
                       choices=("latency", "throughput"))
    pin_threads: bool = option(False, "bind each CPU thread to one core")
    memory_budget: str = option("", "memory of this process, as 2GB: as many images share a call as fit",
                                default="no limit")
    check: bool = option(False, "hash large files even if they did not change since they were hashed last")
    output: Path = option(Path("out.png"), "PNG file to write; several images get numbered names",
                          flags=("-o", "--output"))

    def __post_init__(self) -> None:
        """Read the device; refuse what is no choice or out of range."""
        object.__setattr__(self, "device", Device.parse(self.device))
        for declared in dataclasses.fields(self):
            value, said = getattr(self, declared.name), declared.metadata
            name = f"--{declared.name.replace('_', '-')}"
            if value and "choices" in said and value not in said["choices"]:
                raise InputError(f"unknown {value!r}", where=name, fix=f"one of {', '.join(said['choices'])}")
            if value is not None and "least" in said and value < said["least"]:
                raise InputError(f"{value} is less than {said['least']}", where=name)


def generate_options() -> list[Option]:
    """The bundle, the fields of a request, and what concerns the command alone."""
    bundle, *others = from_dataclass(GenerateOptions)
    return [bundle, *request_options(), *others]


def request_options() -> list[Option]:
    """An option for each field of a request but those that say why they have none."""
    options = []
    for declared in dataclasses.fields(Request):
        said = declared.metadata
        if "no_option" not in said:
            word: Any = said["kind"].word
            limits = {name: said[name] for name in ("flags", "choices", "least", "above", "most", "argument")
                      if name in said}
            options.append(Option(declared.name, list[word] if said["kind"].several else word, said["help"],
                                  said.get("command_line", said.get("default", declared.default)), **limits))
    return options


def generate(given: dict[str, Any]) -> None:
    """Generate images with a bundle. Needs no PyTorch."""
    own = {declared.name for declared in dataclasses.fields(GenerateOptions)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    generate_files(GenerateOptions(**{name: value for name, value in given.items() if name in own}),
                   {name: value for name, value in given.items() if name not in own})


def request_of(options: GenerateOptions, asked: Mapping[str, Any], bundle: Bundle) -> tuple[Request, dict[str, Any]]:
    """What is asked of the pipeline, and the fields that are not left to their defaults.

    Args:
        options: says where prompts and presets are.
        asked: fields of the request that are given; several values in a tuple.
        bundle: that the presets were measured of.

    Raises:
        InputError: no prompt or two sources of them, or a field that cannot be used.
    """
    fields = {**chosen_setting(options, bundle.manifest.digest).options(),
              **{declared.name: declared.metadata["command_line"] for declared in dataclasses.fields(Request)
                 if "command_line" in declared.metadata},
              **{name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
                 for name, value in asked.items()}}
    fields["prompt"] = prompts_of(options, asked.get("prompt", ()), wanted=bool(bundle.manifest.pipeline.encoders))
    return Request(**fields), fields


def prompts_of(options: GenerateOptions, given: tuple[str, ...], *, wanted: bool = True) -> tuple[str, ...]:
    """Prompts from the arguments or the file, one a line; empty lines are left out.

    Args:
        options: name the file.
        given: the arguments.
        wanted: whether the model reads prompts; one that does not generates one image for no prompt.

    Raises:
        InputError: both or neither given, an unreadable file, or nothing in it.
    """
    if options.prompts is None:
        if not given and wanted:
            raise InputError("no prompt", where="generate", fix='give one: generate BUNDLE "a red apple"')
        return given or ("",)
    if given:
        raise InputError("both a prompt and --prompts are given", where="generate", fix="give one of them")
    from calibration.trajectory.prompts import read_prompts

    return tuple(read_prompts(options.prompts))


def generate_files(options: GenerateOptions, asked: Mapping[str, Any]) -> list[Path]:
    """Generate and write; returns the files written.

    Args:
        options: what asks nothing of the pipeline.
        asked: fields of the request that are given; several values in a tuple.
    """
    import runtimes

    for name, file in (("-o", options.output), ("--preview", options.preview),
                       ("--save-latents", options.save_latents)):
        check_file(file, name)
    began = time.perf_counter()
    bundle = runtimes.Bundle.open(options.bundle, trust_notes=not options.check)
    check_session(options, bundle)
    if options.safety != "off":
        bundle.component(SAFETY_CHECKER)  # refused before any work if it has none
    request, fields = request_of(options, asked, bundle)
    budget = parse_bytes(options.memory_budget, "--memory-budget") if options.memory_budget else None
    pipeline = runtimes.load(bundle, device=options.device, threads=options.threads, hint=options.hint,
                             pin_threads=options.pin_threads, memory_budget=budget, lora=options.lora)
    loaded = time.perf_counter()
    with console.StepProgress(request.steps) as progress:
        def on_step(step: Step) -> None:
            progress.on_step(step)
            if options.preview is not None:
                save_preview(pipeline.preview(step.estimate), bundle.manifest.pipeline.codec.factor, options.preview)

        result = pipeline(request, on_step=on_step)
    if options.safety != "off":
        result = checked(pipeline, result, replace=options.safety == "replace")
    if options.save_latents is not None:
        save_array(progress.latents, options.save_latents)
    texts = descriptions(options, request, fields, bundle.manifest.digest) if options.metadata else []
    files = save_images(result, options.output, options.grid, texts)
    generated = time.perf_counter()
    console.show_generated(files, count=len(result), load_seconds=loaded - began, generate_seconds=generated - loaded,
                           peak_rss_bytes=peak_rss_bytes())
    return files


def check_session(options: GenerateOptions, bundle: Bundle) -> None:
    """Refuse what the bundle's backend would not look at.

    Raises:
        InputError: an option of another backend.
    """
    formats = {component.format for component in bundle.manifest.components.values()}
    if options.hint != "latency" and "openvino" not in formats:
        raise InputError(f"only OpenVINO takes the hint {options.hint!r}", where="--hint", fix="leave it out")
    if options.pin_threads and (options.device.kind != "cpu" or "tensorrt" in formats):
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


def chosen_setting(options: GenerateOptions, digest: str) -> Setting:
    """What --quality or --budget-ms stand for, else the defaults.

    Raises:
        InputError: both are given, or nothing is fast enough.
        UnavailableError: the bundle was not measured on this machine.
    """
    if options.quality and options.budget_ms is not None:
        raise InputError("both --quality and --budget-ms are given", where="generate", fix="give one of them")
    if options.quality:
        return presets.preset(options.quality, presets.load(digest)).setting
    if options.budget_ms is not None:
        return presets.within(options.budget_ms, presets.load(digest)).setting
    return Setting(DEFAULT_STEPS)


def descriptions(options: GenerateOptions, request: Request, fields: Mapping[str, Any], digest: str,
                 ) -> list[dict[str, str]]:
    """What each image's PNG says about how it was made; what is not said was left to its default."""
    said = {name: str(fields[name] or "") for name in ("steps", "scheduler", "guidance_scale") if name in fields}
    lora = ", ".join(Path(option).name for option in options.lora)
    return image_texts.descriptions(request, {"bundle": digest, "lora": lora, **said})
