"""What clients of AUTOMATIC1111's web UI need of its API, Open WebUI, SillyTavern and webuiapi among them.

Fields that change the image are honoured, or refused by name unless they hold the value that changes nothing: clients
send all of them. Fields without effect on the image are accepted. Sizes, steps and guidance that are left out are the
bundle's own, not the web UI's 512 x 512, 50 and 7.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Annotated, Any

import pydantic_core
from fastapi import APIRouter, Query
from PIL import ImageChops
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.http.access import noted, owner_of, service_of
from runtimes.serving.http.asked_for import check_size, order_of
from runtimes.serving.http.failures import HttpError, documented
from runtimes.serving.http.received import from_base64, image_file, json_body, mask_of_white, png
from runtimes.serving.http.running import Result, Run, preview_files, result_while_connected
from runtimes.serving.http.schemas import MOST_N, MOST_STEPS, MOST_TEXT
from runtimes.serving.http.service import Service
from runtimes.serving.state.order import Order, Output, opened

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])
JSON = "application/json"
SAMPLERS = {"ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler-ancestral": "Euler a", "heun": "Heun",
            "kdpm2": "DPM2", "kdpm2-ancestral": "DPM2 a", "lms": "LMS", "dpm++": "DPM++ 2M", "dpm-sde": "DPM++ SDE",
            "unipc": "UniPC", "lcm": "LCM", "pndm": "PLMS"}
MOST_PREVIEWS = 8
# Change nothing in the image, whatever they hold.
WITHOUT_EFFECT = frozenset({
    "save_images", "do_not_save_samples", "do_not_save_grid", "force_task_id", "override_settings_restore_afterwards",
    "disable_extra_networks", "comments", "include_init_images", "infotext", "script_args", "subseed",
    "image_cfg_scale", "mask_round"})
# Matter only where another field is set, which is refused.
ONLY_WITH = {"hr_": "enable_hr", "firstphase_": "enable_hr", "firstpass_image": "enable_hr",
             "refiner_switch_at": "refiner_checkpoint", "seed_resize_from_": "seed_resize_from_w"}
# Would change the image: these values do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,), "restore_faces": (False,), "tiling": (False,), "styles": ([],), "subseed_strength": (0,),
    "seed_resize_from_w": (0, -1), "seed_resize_from_h": (0, -1), "s_churn": (0,), "s_tmin": (0,),
    "s_tmax": (0, float("inf")), "s_noise": (1,), "s_min_uncond": (0,), "script_name": ("", "None"),
    "alwayson_scripts": ({},), "refiner_checkpoint": ("", "None"), "resize_mode": (0,),
    "initial_noise_multiplier": (1, 0), "scheduler": ("Automatic", "automatic", ""), "latent_mask": (),
}
NEUTRAL_WITH_MASK: dict[str, tuple[Any, ...]] = {
    "mask_blur": (0,), "mask_blur_x": (0,), "mask_blur_y": (0,), "inpainting_fill": (1,), "inpaint_full_res": (False,),
    "inpaint_full_res_padding": (0,)}


class Text2Image(BaseModel):
    """POST /sdapi/v1/txt2img: the fields that are honoured. See above for the others of the web UI."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False,
                              json_schema_extra={"examples": [{"prompt": "a red apple", "seed": 7}]})

    prompt: Annotated[str, Field(max_length=MOST_TEXT)] = ""
    negative_prompt: Annotated[str | None, Field(max_length=MOST_TEXT)] = None
    seed: Annotated[int | None, Field(ge=-1, le=2**32 - 1, description="-1 is an unpredictable one.")] = -1
    sampler_name: Annotated[str | None, Field(max_length=64, description="One of GET /sdapi/v1/samplers.")] = None
    sampler_index: Annotated[str | None, Field(max_length=64, description="The older name of sampler_name.")] = None
    batch_size: Annotated[int | None, Field(ge=1, le=MOST_N)] = None
    n_iter: Annotated[int | None, Field(ge=1, le=MOST_N, description="Multiplies batch_size.")] = None
    steps: Annotated[int | None, Field(ge=1, le=MOST_STEPS)] = None
    cfg_scale: Annotated[float | None, Field(ge=0, le=1e4)] = None
    width: Annotated[int | None, Field(ge=1, le=1 << 16)] = None
    height: Annotated[int | None, Field(ge=1, le=1 << 16)] = None
    eta: Annotated[float | None, Field(ge=0, le=1)] = None
    denoising_strength: Annotated[float | None, Field(ge=0, le=1, description="Of img2img; in txt2img without effect, "
                                                      "as it belongs to hires fix.")] = None
    override_settings: Annotated[dict[str, Any] | None, Field(description="sd_model_checkpoint alone.")] = None
    send_images: bool | None = None


class Image2Image(Text2Image):
    """POST /sdapi/v1/img2img: the fields that are honoured."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1, description="One image in base64.")]
    mask: Annotated[str | None, Field(description="White where the image is painted anew, in base64.")] = None
    inpainting_mask_invert: Annotated[int | None, Field(ge=0, le=1, description="1 paints the black anew.")] = None


class Generated(BaseModel):
    """The images, what was asked for, and how they were made as JSON in a text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Options(BaseModel):
    """The settings that there are here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sd_model_checkpoint: Annotated[str | None, Field(max_length=200, description="The bundle that this key's further "
                                                     "requests use.")] = None
    sd_checkpoint_hash: str | None = None
    samples_format: str | None = None


_ERRORS = documented(400, 401, 404, 413, 415, 422, 429, 500, 503)


def _documents(kind: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI page says, the fields that are not honoured among it."""
    neutral = NEUTRAL | ({} if kind is Text2Image else NEUTRAL_WITH_MASK)
    refused = ", ".join(f"{name} ({' or '.join(map(json.dumps, known)) or 'null'})" for name, known in neutral.items())
    text = ("As the web UI's endpoint of this name. Accepted without effect on the image: "
            f"{', '.join(sorted(WITHOUT_EFFECT))}, and hr_* and firstphase_* while enable_hr is false. Refused by name "
            f"unless they change nothing: {refused}. Other fields are refused as unknown.")
    return {"description": text, "response_model": None, "responses": {200: {"model": Generated}, **_ERRORS},
            "openapi_extra": {"requestBody": {"required": True, "content": {JSON: {
                "schema": kind.model_json_schema()}}}}}


@router.post("/txt2img", summary="Generate images", **_documents(Text2Image))
async def txt2img(request: Request) -> Response:
    """As the web UI's endpoint of this name."""
    return await _generated(request, await json_body(request, Text2Image))


@router.post("/img2img", summary="Generate from an image", **_documents(Image2Image))
async def img2img(request: Request) -> Response:
    """As the web UI's endpoint of this name; the mask is not blurred, and lies over the whole image."""
    return await _generated(request, await json_body(request, Image2Image))


async def _generated(request: Request, body: Text2Image) -> Response:
    service, owner = service_of(request), owner_of(request)
    service.check_open()
    order = await asyncio.to_thread(_order, service, body, owner)
    images = order.fields["images_per_prompt"]
    service.rates.take(owner, images)
    noted(request, model=order.model, images=images)
    run = Run(service, order)
    await run.start(MOST_PREVIEWS)
    runs = service.runs.setdefault(owner, [])
    runs.append(run)
    try:
        result = await result_while_connected(request, run)
    finally:
        runs.remove(run)
    contents = [] if body.send_images is False else [base64.b64encode(image.content).decode()
                                                     for image in result.images]
    parameters = body.model_dump(exclude={"init_images", "mask"})
    info = _info(order, result, _sampler(body) or "")
    return Response(pydantic_core.to_json({"images": contents, "parameters": parameters, "info": json.dumps(info)}),
                    media_type=JSON)


def _order(service: Service, body: Text2Image, owner: str) -> Order:
    masked = isinstance(body, Image2Image) and body.mask is not None
    _refuse_unhonoured(body, masked)
    model = service.model(_model_in(body.override_settings), owner)
    fields: dict[str, Any] = {**model.preset("standard"), "prompt": body.prompt,
                              "images_per_prompt": (body.batch_size or 1) * (body.n_iter or 1)}
    scheduler = _scheduler(_sampler(body))
    for name, value in (("negative_prompt", body.negative_prompt or None), ("steps", body.steps),
                        ("eta", _eta(body.eta, scheduler)), ("guidance_scale", body.cfg_scale),
                        ("scheduler", scheduler), ("seed", None if body.seed in (None, -1) else body.seed)):
        if value is not None:
            fields[name] = value
    files = {}
    if isinstance(body, Image2Image):
        files = _files(service, body)
        strength = 0.75 if body.denoising_strength is None else body.denoising_strength
        if strength <= 0:
            raise HttpError(400, "at a denoising_strength of 0 the image stays as it is", code="invalid_value",
                            where="denoising_strength", fix="give more than 0")
        fields["strength"] = strength
    fields["height"], fields["width"] = body.height or model.height, body.width or model.width
    check_size(model, fields["height"], fields["width"], "width")
    return order_of(service, model, fields, files, Output("png", 100, service.options.metadata))


def _refuse_unhonoured(body: Text2Image, masked: bool) -> None:
    """Refuse what would change the image and is not done here.

    Raises:
        HttpError: 400 by the field's name.
    """
    allowed = NEUTRAL | (NEUTRAL_WITH_MASK if masked else {})
    for name, value in (body.model_extra or {}).items():
        if value is None or name in WITHOUT_EFFECT or (not masked and name in (*NEUTRAL_WITH_MASK,
                                                                              "inpainting_mask_invert")):
            continue
        if any(name.startswith(prefix) and name != switch for prefix, switch in ONLY_WITH.items()):
            continue
        if name not in allowed:
            raise HttpError(400, f"unknown field {name!r:.80}", code="unknown_field", where=name)
        if not any(_same(value, neutral) for neutral in allowed[name]):
            known = " or ".join(json.dumps(neutral) for neutral in allowed[name]) or "null"
            raise HttpError(400, f"{name} is not done here", code="unsupported_field", where=name,
                            fix=f"leave it out, or give {known}")


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _model_in(settings: dict[str, Any] | None) -> str | None:
    """The model of override_settings, which hold nothing else.

    Raises:
        HttpError: 400 by the name of what they hold.
    """
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    name = settings.pop("sd_model_checkpoint", None)
    if settings:
        raise HttpError(400, f"the setting {next(iter(settings))!r:.80} is not honoured here",
                        code="unsupported_field", where="override_settings", fix="give sd_model_checkpoint alone")
    if name is not None and not isinstance(name, str):
        raise HttpError(400, "sd_model_checkpoint is no text", code="invalid_value", where="override_settings")
    return name


def _files(service: Service, body: Image2Image) -> dict[str, bytes]:
    most = service.options.max_pixels
    files = {"image": image_file(from_base64(body.init_images[0], "init_images"), "init_images", most)}
    if body.mask is not None:
        mask = mask_of_white(from_base64(body.mask, "mask"), "mask", most)
        files["mask"] = png(ImageChops.invert(opened(mask, "mask"))) if body.inpainting_mask_invert else mask
    return files


def _sampler(body: Text2Image) -> str | None:
    return body.sampler_name or body.sampler_index or None


def _scheduler(sampler: str | None) -> str | None:
    """Our name of a sampler of the web UI; others are taken for our own, and refused later where they are not."""
    if sampler is None:
        return None
    return {shown.lower(): name for name, shown in SAMPLERS.items()}.get(sampler.lower(), sampler)


def _eta(eta: float | None, scheduler: str | None) -> float | None:
    """The share of fresh noise, which the web UI passes to ancestral samplers, whose 1 is ours, and to DDIM alone.

    Raises:
        HttpError: 400 for another one of an ancestral sampler.
    """
    if eta is None or scheduler in (None, "ddim", "tcd"):
        return eta
    if scheduler in ("euler-ancestral", "kdpm2-ancestral") and eta != 1:
        raise HttpError(400, "ancestral samplers have an eta of 1 here", code="unsupported_field", where="eta",
                        fix="leave it out, or give 1")
    return None


def _info(order: Order, result: Result, sampler: str) -> dict[str, Any]:
    """What the web UI says of its images, as far as there is such a thing here."""
    fields, seeds = order.fields, [image.seed for image in result.images]
    prompt, negative, count = fields["prompt"], fields.get("negative_prompt") or "", len(seeds)
    steps, size = fields.get("steps", DEFAULT_STEPS), f"{fields['width']}x{fields['height']}"
    texts = [f"{prompt}\nNegative prompt: {negative}\nSteps: {steps}, Sampler: {sampler or 'Automatic'}, "
             f"CFG scale: {fields.get('guidance_scale', 'default')}, Seed: {seed}, Size: {size}, "
             f"Model hash: {result.digest[:10]}, Model: {order.model}" for seed in seeds]
    return {"prompt": prompt, "all_prompts": [prompt] * count, "negative_prompt": negative,
            "all_negative_prompts": [negative] * count, "seed": seeds[0], "all_seeds": seeds,
            "width": fields["width"], "height": fields["height"], "sampler_name": sampler,
            "cfg_scale": fields.get("guidance_scale"), "steps": steps, "batch_size": count,
            "denoising_strength": fields.get("strength"), "sd_model_name": order.model,
            "sd_model_hash": result.digest[:10], "infotexts": texts, "index_of_first_image": 0,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"), "flagged": [i.flagged for i in result.images]}


# ---- what there is -----------------------------------------------------------------------------------------------


@router.get("/options", summary="Read settings", responses={200: {"model": Options}, **documented(401, 500)},
            response_model=None)
async def options(request: Request) -> Response:
    """The bundle that further requests of this key use."""
    return JSONResponse(_options(service_of(request).model(None, owner_of(request))))


@router.post("/options", summary="Change settings", response_model=None, responses={
    200: {"description": "Changed.", "model": dict[str, Any]}, **documented(400, 401, 404, 413, 415, 500)},
    openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": Options.model_json_schema()}}}})
async def set_options(request: Request) -> Response:
    """Chooses the bundle of further requests of this key; settings that cannot change are refused unless unchanged."""
    body = await json_body(request, Options)
    service, owner = service_of(request), owner_of(request)
    chosen = service.model(body.sd_model_checkpoint, owner)
    for name, value in _options(chosen).items():
        given = getattr(body, name)
        known = {value, *(m.digest for m in service.catalog.values())} if name == "sd_checkpoint_hash" else {value}
        if given is not None and given not in known:
            raise HttpError(400, f"{name} cannot be changed", code="unsupported_field", where=name)
    if body.sd_model_checkpoint is not None:
        service.chosen[owner] = chosen.name
    return JSONResponse({})


def _options(model: ServedModel) -> dict[str, Any]:
    return {"sd_model_checkpoint": model.name, "sd_checkpoint_hash": model.digest, "samples_format": "png"}


@router.get("/sd-models", summary="List bundles", response_model=None,
            responses={200: {"model": list[dict[str, Any]]}, **documented(401, 500)})
async def sd_models(request: Request) -> Response:
    """The served bundles; no file is named."""
    return JSONResponse([{"title": model.name, "model_name": model.name, "hash": model.digest[:10],
                          "sha256": model.digest, "filename": model.name, "config": None}
                         for model in service_of(request).catalog.values()])


@router.get("/samplers", summary="List sampling methods", response_model=None,
            responses={200: {"model": list[dict[str, Any]]}, **documented(401, 500)})
async def samplers(request: Request) -> Response:
    """Those of the chosen bundle, under the web UI's names where it has one."""
    names = service_of(request).model(None, owner_of(request)).schedulers
    return JSONResponse([{"name": SAMPLERS.get(name, name), "aliases": [name], "options": {}} for name in names])


@router.get("/schedulers", summary="List noise schedules", response_model=None,
            responses={200: {"model": list[dict[str, Any]]}, **documented(401, 500)})
async def schedulers(request: Request) -> Response:
    """The bundle's own is the only one."""
    return JSONResponse([{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": None,
                          "need_inner_model": False}])


@router.get("/progress", summary="How far it is", response_model=None,
            responses={200: {"model": dict[str, Any]}, **documented(400, 401, 500)})
async def progress(request: Request, skip_current_image: Annotated[bool, Query()] = False) -> Response:
    """The oldest request of this key that is under way."""
    service, owner = service_of(request), owner_of(request)
    runs = service.runs.get(owner, [])
    step, total, preview = runs[0].progress() if runs else (0, 0, None)
    image = None
    if preview is not None and not skip_current_image:
        fields = runs[0].order.fields
        files = await asyncio.to_thread(preview_files, preview[:1], fields["width"], fields["height"], "png")
        image = base64.b64encode(files[0]).decode()
    state = {"skipped": False, "interrupted": False, "job": runs[0].order.model if runs else "",
             "job_count": len(runs), "job_no": 0, "sampling_step": step, "sampling_steps": total,
             "job_timestamp": time.strftime("%Y%m%d%H%M%S") if runs else "0"}
    left = runs[0].seconds_left() if runs else 0.0
    return JSONResponse({"progress": step / total if total else 0.0, "eta_relative": left, "state": state,
                         "current_image": image, "textinfo": None})


@router.post("/interrupt", summary="Cancel", response_model=None,
             responses={200: {"model": dict[str, Any]}, **documented(401, 500)})
async def interrupt(request: Request) -> Response:
    """Cancels the requests of this key that came through these endpoints: they are answered with an error."""
    for run in service_of(request).runs.get(owner_of(request), []):
        run.cancel()
    return JSONResponse({})
