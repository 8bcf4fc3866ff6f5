"""diffusers' side of a case: the folder loaded the documented way, adapters by its own loaders, one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.schedulers import CLASS_NAMES
from tests.fuzz.case import Case, Request
from tests.fuzz.models import other_vae
from tests.fuzz.trace import Stopped, Trace, record_diffusers
from tests.fuzz.weight_files import OF_VARIANTS

AUTO = {"text": "AutoPipelineForText2Image", "image": "AutoPipelineForImage2Image", "mask": "AutoPipelineForInpainting"}
# Our names of sampling methods -> diffusers' classes, for requests that name one.
METHODS = {method: name for name, method in CLASS_NAMES.items()}
SIZES = {"original": (64, 48), "crop": (4, 8), "target": (40, 24)}


def run(case: Case, folder: Path, files: Mapping[str, Path], pictures: Mapping[str, Any],
        mends: Sequence[Callable[[Any, Request, list[Any]], dict[str, Any]]] = ()) -> Trace | Stopped:
    """Load and call diffusers' pipeline.

    Args:
        case: to run.
        folder: of the model.
        files: adapter files by name, "lora0", "embedding1".
        pictures: "image" and "mask" as the caller has them.
        mends: of known faults (known.py).
    """
    trace, stage = Trace(), "build"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe = _load(case, folder)
            _adapt(pipe, case, files)
            stage = "request"
            record_diffusers(pipe, trace, eight_bit=case.request.output == "pil")
            generators = make_generators(case.request)
            more = {k: v for mend in mends for k, v in mend(pipe, case.request, generators).items()}
            trace.result = _call(pipe, case.request, pictures, generators, **more)
        except Exception as error:  # whatever a library raises over a generated folder
            return Stopped(stage, type(error).__name__, str(error).strip().partition("\n")[0][:300],
                           networks_ran=bool(trace.calls))
    return trace


def _load(case: Case, folder: Path) -> Any:
    import diffusers
    import torch

    model, options = case.model, dict[str, Any]()
    kind = "DiffusionPipeline" if model.kind.startswith("ldm") else AUTO[case.request.mode]
    if model.kind in ("sd", "sd2", "inpaint"):
        options["safety_checker"] = None
    elif model.kind in ("xl", "refiner"):
        options["add_watermarker"] = False
    if model.vae:
        vae = diffusers.AutoencoderTiny if model.vae.startswith("tiny") else diffusers.AutoencoderKL
        options["vae"] = vae.from_pretrained(str(other_vae(model.vae)))
    if any(layout in OF_VARIANTS for layout in model.layouts.values()):
        options["variant"] = "fp16"
    # transformers 5 would load a text encoder in the dtype that its config names; both sides compute in float32.
    pipe = getattr(diffusers, kind).from_pretrained(str(folder), torch_dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    if (name := case.request.scheduler) is not None:
        pipe.scheduler = getattr(diffusers, METHODS[name]).from_config(pipe.scheduler.config)
    return pipe


def _adapt(pipe: Any, case: Case, files: Mapping[str, Path]) -> None:
    from safetensors.torch import load_file

    for number, embedding in enumerate(case.embeddings):
        file = files[f"embedding{number}"]
        if embedding.form == "clip_l and clip_g":
            vectors = load_file(file)
            pipe.load_textual_inversion(vectors["clip_l"], token=embedding.token, text_encoder=pipe.text_encoder,
                                        tokenizer=pipe.tokenizer)
            pipe.load_textual_inversion(vectors["clip_g"], token=embedding.token, text_encoder=pipe.text_encoder_2,
                                        tokenizer=pipe.tokenizer_2)
        else:
            pipe.load_textual_inversion(str(file), token=embedding.token)
    names = [f"lora{number}" for number in range(len(case.loras))]
    for name in names:
        pipe.load_lora_weights(str(files[name]), adapter_name=name)
    if names:
        pipe.set_adapters(names, [lora.scale for lora in case.loras])


def default_size(pipe: Any) -> tuple[int, int]:
    """What the pipeline makes without height and width, in pixels."""
    size = pipe.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor


def make_latents(request: Request, channels: int, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Initial noise that both sides are given."""
    shape = (len(request.seeds), channels, rows, columns)
    return np.random.default_rng(request.seeds[0]).standard_normal(shape).astype(np.float32)


def make_generators(request: Request) -> list[Any]:
    """One for each image."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]


def _call(pipe: Any, request: Request, pictures: Mapping[str, Any], generators: list[Any],
          **more: Any) -> np.ndarray[Any, Any]:
    options: dict[str, Any] = {
        "num_inference_steps": request.steps, "eta": request.eta, "guidance_scale": request.guidance,
        "generator": generators if len(generators) > 1 else generators[0],
        "output_type": {"numpy": "np", "pil": "pil", "latents": "latent"}[request.output],
    }
    kind = type(pipe).__name__
    if kind == "LDMPipeline":
        options["batch_size"] = len(request.seeds)
        del options["guidance_scale"]
        return _as_array(pipe(**options).images)
    options["prompt"] = request.prompts[0] if len(request.prompts) == 1 else list(request.prompts)
    options |= {"height": request.height, "width": request.width}
    if kind != "LDMTextToImagePipeline":
        options |= _of_clip_pipelines(pipe, request, pictures)
    else:
        if request.images_per_prompt > 1:
            options["prompt"] = [p for p in request.prompts for _ in range(request.images_per_prompt)]
        options["latents"] = _latents(pipe, request)
    return _as_array(pipe(**{k: v for k, v in {**options, **more}.items() if v is not None}).images)


def _of_clip_pipelines(pipe: Any, request: Request, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the Stable Diffusion and XL classes."""
    options: dict[str, Any] = {"num_images_per_prompt": request.images_per_prompt, "strength": request.strength}
    if request.negative is not None:
        texts, one = list(request.negative), len(request.prompts) == 1
        options["negative_prompt"] = texts[0] if one else texts * (1 if len(texts) > 1 else len(request.prompts))
    if request.rescale:
        options["guidance_rescale"] = request.rescale
    if request.last < 1:
        options["denoising_end"] = request.last
    options["latents"] = _latents(pipe, request)
    for name, argument in (("image", "image"), ("mask", "mask_image")):
        if name in pictures:
            options[argument] = _opened(pictures[name])
    if request.sizes != "none":
        wanted = {"original": "original_size", "crop": "crops_coords_top_left", "target": "target_size"}
        options |= {wanted[k]: SIZES[k] for k in SIZES if request.sizes in (k, "all")}
        if request.sizes == "all" and "Img2Img" in type(pipe).__name__:
            options |= {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
    return options


def _latents(pipe: Any, request: Request) -> Any:
    import torch

    if not request.latents:
        return None
    height, width = default_size(pipe) if request.height is None else (request.height, request.width or 0)
    factor = pipe.vae_scale_factor
    return torch.from_numpy(make_latents(request, pipe.unet.config.out_channels, height // factor, width // factor))


def _opened(picture: Any) -> Any:
    """A path by diffusers' own reader; an array as a batch of one."""
    from diffusers.utils import load_image

    if isinstance(picture, Path):
        return load_image(str(picture))
    return picture[None] if isinstance(picture, np.ndarray) else picture


def _as_array(images: Any) -> np.ndarray[Any, Any]:
    if isinstance(images, list):
        return np.stack([np.asarray(image, np.float32) / 255 for image in images])
    return np.asarray(images.detach() if hasattr(images, "detach") else images, np.float32)
