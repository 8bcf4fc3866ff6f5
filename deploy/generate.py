"""`generate`: from command-line values to picture files. Needs the base dependencies only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import console
from deploy.observers import peak_rss_bytes
from runtimes.bundle import translated_disk_errors
from runtimes.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class GenerateRequest:
    """The options of `generate`, unchecked."""

    bundle: Path
    prompts: tuple[str, ...]
    prompts_file: Path | None
    negative: str
    image: Path | None
    strength: float
    steps: int
    guidance_scale: float | None
    seed: int
    count: int
    scheduler: str | None
    height: int | None
    width: int | None
    latents: Path | None
    save_latents: Path | None
    grid: int
    device: str
    threads: int
    hint: str
    pin_threads: bool
    output: Path


def read_prompts(request: GenerateRequest) -> list[str]:
    """Prompts from the arguments or the file, one a line; empty lines are left out.

    Raises:
        InputError: both or neither given, an unreadable file, or nothing in it.
    """
    if request.prompts_file is None:
        if not request.prompts:
            raise InputError("no prompt", where="generate", fix='give one: generate BUNDLE "a red apple"')
        return list(request.prompts)
    if request.prompts:
        raise InputError("both a prompt and --prompts are given", where="generate", fix="give one of them")
    return prompts_in(request.prompts_file)


def prompts_in(file: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines are left out.

    Raises:
        InputError: an unreadable file, or nothing in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts: {error}", where=str(file)) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError("no prompt in the file", where=str(file), fix="write one a line")
    return lines


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


def generate_files(request: GenerateRequest) -> list[Path]:
    """Draw and write; returns the files written."""
    import runtimes

    prompts = read_prompts(request)
    began = time.perf_counter()
    pipeline = runtimes.load(request.bundle, device=request.device, threads=request.threads, hint=request.hint,
                             pin_threads=request.pin_threads)
    loaded = time.perf_counter()
    wanted = [p for p in prompts for _ in range(request.count)]
    options: dict[str, Any] = {}
    if request.guidance_scale is not None:
        options["guidance_scale"] = request.guidance_scale
    if request.latents is not None:
        options["latents"] = read_latents(request.latents)
    if request.image is not None:
        options.update(image=request.image, strength=request.strength)
    with console.StepProgress(request.steps) as progress:
        result = pipeline(
            wanted, negative_prompt=request.negative, steps=request.steps, scheduler=request.scheduler,
            seed=list(range(request.seed, request.seed + len(wanted))), height=request.height, width=request.width,
            on_step=progress.on_step, **options,
        )
    if request.save_latents is not None:
        save_array(progress.latents, request.save_latents)
    files = save_images(result, request.output, request.grid)
    drawn = time.perf_counter()
    console.show_generated(files, count=len(result), load_seconds=loaded - began, draw_seconds=drawn - loaded,
                           peak_rss_bytes=peak_rss_bytes())
    return files


def save_array(array: np.ndarray[Any, Any], file: Path) -> None:
    """Write .npy through a temporary sibling."""
    import numpy as np

    with translated_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        with partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        partial.replace(file)


def save_images(images: list[Image], output: Path, columns: int) -> list[Path]:
    """Write PNG files through temporary siblings: one sheet if columns > 0, else one file a picture."""
    if columns > 0:
        images = [contact_sheet(images, columns)]
    names = [output] if len(images) == 1 else [
        output.with_name(f"{output.stem}-{i + 1:0{len(str(len(images)))}d}{output.suffix or '.png'}")
        for i in range(len(images))
    ]
    for image, file in zip(images, names, strict=True):
        with translated_disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.partial")
            image.save(partial, format="PNG")
            partial.replace(file)
    return names


def contact_sheet(images: list[Image], columns: int) -> Image:
    """Pictures of one size, row by row, on white."""
    from PIL import Image as PillowImage

    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = PillowImage.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * width, (i // columns) * height))
    return sheet
