"""OpenAI's Images API: generations, edits, models; whole answers and streams."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pydantic_core
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from runtimes.bundle.manifest import DEFAULT_STEPS
from runtimes.bundle.tensors import ShapeRange
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.http.access import image_address, noted, owner_of, service_of
from runtimes.serving.http.asked_for import openai_order
from runtimes.serving.http.failures import HttpError, documented, failure_of
from runtimes.serving.http.received import FORM, JSON, Files, form_body, form_schema, json_body
from runtimes.serving.http.running import Result, Run, preview_files, result_while_connected
from runtimes.serving.http.schemas import (
    AS_OPENAI,
    QUALITIES,
    Answered,
    EditBody,
    GenerationBody,
    ImagesAnswer,
    ModelAnswer,
    ModelList,
)
from runtimes.serving.http.service import Service
from runtimes.serving.state.job_run import result_of
from runtimes.serving.state.order import Order

router = APIRouter(prefix="/v1")
STREAM = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
EDIT_FILES = {"image": "PNG, JPEG or WebP; image[] is the same. One image.",
              "mask": "Of the image's size; what is fully transparent is painted anew."}
WORK_ERRORS = (400, 401, 404, 413, 415, 422, 429, 500, 503)


def _documents(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI page says of an endpoint that answers whole or by a stream."""
    events = {"schema": {"type": "string", "description": f"Server-sent events {kind}.partial_image (none for images in"
                         f" the cache) and {kind}.completed for each image, or error."}}
    return {
        "response_model": None,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: {"model": ImagesAnswer, "description": "The images; a stream where stream is true.",
                            "content": {STREAM: events}}, **documented(*WORK_ERRORS), 507: documented(507)[507]},
    }


@router.post("/images/generations", tags=["images"], summary="Generate images",
             **_documents("image_generation", {JSON: {"schema": GenerationBody.model_json_schema()}}))
async def generate(request: Request) -> Response:
    """Generates images from a text, as OpenAI's endpoint of this name. Fields that are not known are refused."""
    body = await json_body(request, GenerationBody)
    return await _answer(request, body, {}, "image_generation")


@router.post("/images/edits", tags=["images"], summary="Edit an image",
             **_documents("image_edit", {FORM: {"schema": form_schema(EditBody, EDIT_FILES, ("image",))}}))
async def edit(request: Request) -> Response:
    """Starts from an image; with a mask, paints only what is transparent in it."""
    body, files = await form_body(request, EditBody, tuple(EDIT_FILES))
    if "image" not in files:
        raise HttpError(400, "no image", code="missing_field", where="image", fix="send it as a file of the form")
    return await _answer(request, body, files, "image_edit")


async def _answer(request: Request, body: Answered, files: Files, kind: str) -> Response:
    service, owner = service_of(request), owner_of(request)
    if body.stream and body.response_format == "url":
        raise HttpError(400, "a stream holds the images themselves", code="invalid_value", where="response_format",
                        fix="leave it out, or do not stream")
    if body.partial_images and not body.stream:
        raise HttpError(400, "partial images are shown by a stream alone", code="invalid_value",
                        where="partial_images", fix="set stream")
    service.check_open()
    if files:
        order = await asyncio.to_thread(openai_order, service, body, files, owner)
    else:
        order = openai_order(service, body, files, owner)
    service.rates.take(owner, body.n or 1)
    noted(request, model=order.model, images=body.n or 1)
    run = Run(service, order)
    await run.start(body.partial_images or 0 if body.stream else 0)
    if body.stream:
        return StreamingResponse(_events(run, body, kind), media_type=STREAM, headers=STREAM_HEADERS)
    result = await result_while_connected(request, run)
    data = await _data(request, service, order, result, body)
    answer = {"created": int(time.time()), "data": data, **_described(order, body), "model": order.model,
              "usage": _usage(order, result), "digest": result.digest, "cached": result.cached}
    return Response(pydantic_core.to_json(answer), media_type=JSON)


async def _data(request: Request, service: Service, order: Order, result: Result, body: Answered,
                ) -> list[dict[str, Any]]:
    """Each image with its seed, by its content or by an address."""
    if body.response_format == "url":
        files = [(image.content, image.kind) for image in result.images]
        record = result_of([image.seed for image in result.images], [image.flagged for image in result.images],
                           result.digest, judged=result.judged)
        await asyncio.to_thread(service.store.record, order.to_json(), files, record, model=order.model,
                                owner=owner_of(request))
    found = []
    for image in result.images:
        shown = ({"url": image_address(request, image.sha256, image.kind)} if body.response_format == "url"
                 else {"b64_json": base64.b64encode(image.content).decode()})
        found.append({**shown, "seed": image.seed, "flagged": image.flagged if result.judged else None})
    return found


async def _events(run: Run, body: Answered, kind: str) -> AsyncIterator[bytes]:
    """Previews, then the images; the order is cancelled when the client goes away."""
    order, described = run.order, _described(run.order, body)
    width, height = (int(side) for side in described["size"].split("x"))
    index = 0
    try:
        async for preview in run.previews():
            if preview is None:
                yield format_sse_event(comment="waiting")
                continue
            files = await asyncio.to_thread(preview_files, preview, width, height, order.output.kind)
            for place, content in enumerate(files):
                yield _event(f"{kind}.partial_image", content, described, partial_image_index=index, image_index=place)
            index += 1
        result = await run.result()
        usage = _usage(order, result)
        for place, image in enumerate(result.images):
            yield _event(f"{kind}.completed", image.content, described, usage=usage, image_index=place, seed=image.seed,
                         flagged=image.flagged if result.judged else None, digest=result.digest, cached=result.cached)
    except Exception as error:
        yield format_sse_event(event="error", data_str=json.dumps(failure_of(error).body()))
    finally:
        run.cancel()


def _event(kind: str, content: bytes, described: dict[str, Any], **more: Any) -> bytes:
    values = {"type": kind, "b64_json": base64.b64encode(content).decode(), "created_at": int(time.time()),
              **described, **more}
    return format_sse_event(event=kind, data_str=pydantic_core.to_json(values).decode())


def _described(order: Order, body: Answered) -> dict[str, Any]:
    """What OpenAI's answers and events say of every image."""
    return {"background": "opaque", "output_format": order.output.kind,
            "quality": AS_OPENAI[QUALITIES[body.quality or "auto"]],
            "size": f"{order.fields['width']}x{order.fields['height']}"}


def _usage(order: Order, result: Result) -> dict[str, Any]:
    """Words, images and denoising steps, under OpenAI's names."""
    words = sum(len(str(order.fields.get(name) or "").split()) for name in ("prompt", "negative_prompt"))
    images, steps = len(order.files), order.fields.get("steps", DEFAULT_STEPS) * len(result.images)
    output = 0 if result.cached else steps
    return {"input_tokens": words + images, "input_tokens_details": {"text_tokens": words, "image_tokens": images},
            "output_tokens": output, "total_tokens": words + images + output}


@router.get("/models", tags=["models"], summary="List the served bundles",
            responses={200: {"model": ModelList}, **documented(401, 500)}, response_model=None)
async def models(request: Request) -> Response:
    """Every served bundle with what it makes."""
    service = service_of(request)
    found = [_model(service, model) for model in service.catalog.values()]
    return Response(pydantic_core.to_json({"object": "list", "data": found}), media_type=JSON)


@router.get("/models/{name}", tags=["models"], summary="Describe a served bundle",
            responses={200: {"model": ModelAnswer}, **documented(401, 404, 500)}, response_model=None)
async def model(request: Request, name: str) -> Response:
    """One served bundle."""
    service = service_of(request)
    return Response(pydantic_core.to_json(_model(service, service.model(name))), media_type=JSON)


def _model(service: Service, model: ServedModel) -> dict[str, Any]:
    options = service.options
    return {
        "id": model.name, "object": "model", "created": model.created, "owned_by": "ldm-deploy", "digest": model.digest,
        "family": model.family, "precision": model.precision, "size": f"{model.width}x{model.height}",
        "heights": _span(*model.heights), "widths": _span(*model.widths), "schedulers": list(model.schedulers),
        "qualities": list(model.presets),
        "presets": {quality: dict(fields) for quality, fields in model.presets.items()},
        "edits": model.edits, "inpaints": model.inpaints, "takes_prompt": model.takes_prompt,
        "safety_checker": model.has_safety_checker,
        "steps": model.presets.get("standard", {}).get("steps", DEFAULT_STEPS),
        "limits": {"images": options.max_images, "pixels": options.max_pixels, "steps": options.max_steps}}


def _span(span: ShapeRange, multiple: int) -> dict[str, int]:
    return {"least": span.min, "most": span.max, "multiple": multiple}
