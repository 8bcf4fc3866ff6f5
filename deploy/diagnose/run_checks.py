"""Runs `diagnose`: four checks that find where a pipeline goes wrong, in the order in which its parts depend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.diagnose.checks import Diagnosis, Samples, check_guidance, check_text, check_unconditional, check_vae
from deploy.diagnose.probe import Probe
from deploy.parity.comparison_options import PROMPTS
from deploy.parity.reference.trajectories import assemble_pipeline
from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import MANIFEST_FILE
from runtimes.codec.autoencoder import to_uint8
from runtimes.codec.pixels import open_image, to_pil, to_pixels
from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline, Step
from runtimes.system.cache_root import cache_home
from runtimes.system.device import CPU, Device
from runtimes.system.progress import listener

Float32 = NDArray[np.float32]
IMAGES = 4
GRID_COLUMNS = 8


@dataclass(frozen=True)
class DiagnoseOptions:
    """How to look.

    Attributes:
        images: images for the VAE; the pipeline's own images where there are none.
        steps, guidance_scale: of the images.
        device: where a bundle runs.
    """

    images: tuple[Path, ...] = ()
    steps: int = 20
    guidance_scale: float = 5.0
    device: Device = CPU


@contextmanager
def opened(target: str, device: Device) -> Iterator[tuple[Mapping[str, Session], Bundle]]:
    """The networks of a bundle, by its runtime alone, or of a model, by PyTorch.

    Raises:
        BundleError, InputError: it is neither.
    """
    from runtimes.backends.session import SessionOptions
    from runtimes.pipeline.bundle_sessions import BundleSessions

    if (Path(target) / MANIFEST_FILE).is_file():
        bundle = Bundle.open(target)
        yield BundleSessions(bundle, SessionOptions(device)), bundle
        return
    if device.kind != "cpu":
        raise InputError("a model is diagnosed in PyTorch on the CPU", where="--device",
                         fix="leave it out, or build a bundle and diagnose that")
    from deploy.building.builder import load_source, workspace
    from deploy.core.pass_cache import Cache
    from deploy.core.spec import BuildSpec
    from deploy.model.source_bundle import open_origin

    spec, root = BuildSpec(model=target), cache_home()
    origin = open_origin(spec)
    with workspace(root) as work:
        source = load_source(origin, spec, Cache(root), work)
        from deploy.parity.reference.torch_sessions import reference_sessions

        yield reference_sessions(source), source


def diagnose_pipeline(target: str, options: DiagnoseOptions, grid: Path | None = None) -> Diagnosis:
    """Look at a bundle or a model.

    Args:
        target: folder of a bundle, or a model as `build` takes it.
        options: how.
        grid: PNG file: a row for each prompt, columns along the denoising.

    Raises:
        InputError: it is neither, or an image cannot be read.
        ParityError: its numbers are not finite; the error says where.
    """
    with opened(target, options.device) as (sessions, bundle):
        probe, pipeline = Probe(sessions, bundle), assemble_pipeline(sessions, bundle)
        codec = bundle.manifest.pipeline.codec
        if codec.encoder.component not in bundle.manifest.components:
            raise InputError(f"there is no {codec.encoder.component}, which every check begins with", where=target)
        images = read_images(options.images, codec.height, codec.width)
        listener().working("generating")
        generated = generate(probe, pipeline, prompts_for(bundle), options)
        listener().working("asking the networks")
        checks = [check_vae(probe, generated, images), check_unconditional(probe, generated, images)]
        if probe.roles.encoders:
            checks += [check_text(probe, generated), check_guidance(probe, generated)]
        if grid is not None:
            write_grid(probe, generated, grid)
    return Diagnosis(tuple(checks))


def prompts_for(bundle: Bundle) -> tuple[str, ...]:
    """What is generated: the reference model's own subjects, or everyday things; nothing of a model without prompts."""
    if not bundle.manifest.pipeline.encoders:
        return ("",) * IMAGES
    if bundle.manifest.source.id == "reference":  # deploy.core.spec.REFERENCE, whose module needs pydantic
        from deploy.reference_models import demo_prompts

        return demo_prompts()[:IMAGES]
    return PROMPTS[:IMAGES]


def read_images(files: Sequence[Path], height: int, width: int) -> Float32 | None:
    """Pixels of the files, (B, 3, H, W) float32 in -1..1, or None without files."""
    if not files:
        return None
    return np.stack([to_pixels(open_image(file, str(file)), height, width) for file in files])


def generate(probe: Probe, pipeline: Pipeline, prompts: tuple[str, ...], options: DiagnoseOptions) -> Samples:
    """Generate the prompts with guidance and without, and as many images without a prompt."""
    estimates: list[Float32] = []
    wanted = {round(i * (options.steps - 1) / (GRID_COLUMNS - 1)) for i in range(GRID_COLUMNS)}

    def keep(step: Step) -> None:
        if step.index in wanted:
            estimates.append(step.estimate.copy())

    def latents(texts: tuple[str, ...], scale: float, on_step: Callable[[Step], None] | None = None) -> Float32:
        result: Float32 = pipeline(list(texts), steps=options.steps, guidance_scale=scale, seed=0, output="latents",
                                   on_step=on_step)
        return result

    guided, plain = latents(prompts, options.guidance_scale, keep), latents(prompts, 1.0)
    blank = latents(("",) * len(prompts), 1.0)
    return Samples(prompts, guided, probe.decode(guided), plain, probe.decode(plain), blank, tuple(estimates))


def write_grid(probe: Probe, generated: Samples, file: Path) -> None:
    """Write a row for each prompt; each column shows the image that the latents of one step predict."""
    from deploy.core.image_files import save_images

    columns = [to_pil(to_uint8(probe.decode(latents))) for latents in generated.estimates]
    save_images([column[row] for row in range(len(generated.prompts)) for column in columns], file, len(columns), [])
