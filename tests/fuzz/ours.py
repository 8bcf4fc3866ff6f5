"""Our side of a case: the passes that define the source, PyTorch sessions under the bundle's ranges, one call."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import DeployError
from tests.fuzz.case import Case
from tests.fuzz.models import other_vae, root
from tests.fuzz.theirs import SIZES, make_latents
from tests.fuzz.trace import Recorded, Stopped, Trace, record_codes
from tests.fuzz.weight_files import OF_VARIANTS


def run(case: Case, folder: Path, files: Mapping[str, Path], pictures: Mapping[str, Any],
        cache: Path | None = None) -> Trace | Stopped:
    """Build as far as parity's reference goes, and call the pipeline; see `theirs.run`. `cache` is for results of
    passes, those of a planted fault apart from all others.
    """
    trace, stage = Trace(), "build"
    work = Path(f"{folder}-work")
    work.mkdir()
    try:
        pipeline = assemble(case, folder, files, work, trace, cache or root() / "cache")
        stage = "request"
        with record_codes(trace):
            trace.result = _call(pipeline, case, pictures)
        return trace
    except Exception as error:  # a crash is a finding, not the fuzzer's end
        deploy = isinstance(error, DeployError)
        code = int(getattr(error, "exit_code", 1)) if deploy else 1
        where = str(getattr(error, "where", ""))
        if stage == "request" and case.request.scheduler is not None and where == "scheduler_config.json":
            where = "scheduler"  # which the request names: nobody could know when the model was read
        return Stopped(stage, type(error).__name__, str(getattr(error, "what", error)), where, code,
                       bool(trace.calls))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_spec(case: Case, folder: Path, files: Mapping[str, Path]) -> Any:
    """What `build` would be given."""
    from deploy.core.spec import BuildSpec

    model, options = case.model, dict[str, Any]()
    if any(layout in OF_VARIANTS for layout in model.layouts.values()) and "variant" in BuildSpec.model_fields:
        options["variant"] = "fp16"
    return BuildSpec(
        model=str(folder), vae=str(other_vae(model.vae)) if model.vae else "",
        lora=tuple(f"{files[f'lora{i}']}:{lora.scale}" for i, lora in enumerate(case.loras)),
        embedding=tuple(f"{files[f'embedding{i}']}:{e.token}" for i, e in enumerate(case.embeddings)), **options)


def _shapes(case: Case, factor: int) -> dict[str, ShapeRange]:
    """Who wants a size that a bundle of default --shapes has not builds one that has; both sides stay in one place."""
    request, picture = case.request, case.request.image if case.request.mode == "image" else None
    width, height = picture.size[:2] if picture else (None, None)
    if picture and picture.orientation > 4 and picture.form in ("png", "jpeg", "tiff"):  # files are turned upright
        width, height = height, width
    wanted = {"height": request.height or height, "width": request.width or width}
    rounded = {name: size // factor * factor for name, size in wanted.items() if size}
    return {name: ShapeRange(size, size, size) for name, size in rounded.items() if size}


def assemble(case: Case, folder: Path, files: Mapping[str, Path], work: Path, trace: Trace, cache: Path) -> Any:
    """The pipeline over PyTorch sessions, as parity's reference has it."""
    from deploy.building.builder import load_source
    from deploy.core.pass_cache import Cache
    from deploy.model.source_bundle import open_origin
    from deploy.parity.reference.torch_sessions import reference_sessions
    from deploy.parity.reference.trajectories import assemble_pipeline

    spec = make_spec(case, folder, files)
    spec = spec.model_copy(update={"shapes": _shapes(case, open_origin(spec).manifest.pipeline.codec.factor)})
    bundle = load_source(open_origin(spec), spec, Cache(cache), work)
    sessions = reference_sessions(bundle)
    recorded = {name: Recorded(session, bundle.component(name), trace) for name, session in sessions.items()}
    return assemble_pipeline(recorded, bundle)


def _call(pipeline: Any, case: Case, pictures: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    from runtimes.inputs.request_fields import SizeConditions

    request = case.request
    options: dict[str, Any] = {
        "prompt": request.prompts[0] if len(request.prompts) == 1 else list(request.prompts), "steps": request.steps,
        "guidance_scale": request.guidance, "eta": request.eta, "guidance_rescale": request.rescale,
        "seed": list(request.seeds), "images_per_prompt": request.images_per_prompt, "output": request.output,
        "height": request.height, "width": request.width, "strength": request.strength,
        "scheduler": request.scheduler, **pictures}
    if request.negative is not None:
        options["negative_prompt"] = request.negative[0] if len(request.negative) == 1 else list(request.negative)
    if request.last < 1:
        options["part"] = (0.0, request.last)
    if request.latents:
        codec = pipeline.roles.codec
        height, width = request.height or codec.height, request.width or codec.width
        factor = codec.factor
        options["latents"] = make_latents(request, codec.latent_channels, height // factor, width // factor)
    if request.sizes != "none":
        wanted: dict[str, Any] = {k: SIZES[k] for k in SIZES if request.sizes in (k, "all")}
        if request.sizes == "all" and case.request.mode == "image":
            wanted |= {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
        options["sizes"] = SizeConditions(**wanted)
    result = pipeline(**{k: v for k, v in options.items() if v is not None})
    if request.output == "pil":
        return np.stack([np.asarray(image, np.float32) / 255 for image in result])
    array: np.ndarray[Any, Any] = result
    return array
