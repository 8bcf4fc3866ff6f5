"""Jobs: accepted once, carried out whatever happens, followed by events; and the images that they leave."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, get_args

import pydantic_core
from fastapi import APIRouter, Header, Query
from fastapi import Path as PathField
from fastapi.sse import format_sse_event
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from runtimes.serving.http.access import image_address, noted, owner_of, service_of
from runtimes.serving.http.asked_for import openai_order
from runtimes.serving.http.failures import HttpError, documented, failure_of
from runtimes.serving.http.received import FORM, JSON, Files, form_body, form_schema, from_base64, json_body
from runtimes.serving.http.schemas import JobAnswer, JobBody, JobList, Kind
from runtimes.serving.http.service import Service
from runtimes.serving.state.order import sha256
from runtimes.serving.state.store import ENDED, JobProgress, StoredJob

router = APIRouter(prefix="/v1")
STREAM = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
FILES = {"image": "PNG, JPEG or WebP to start from.", "mask": "Of the image's size; what is fully transparent is "
         "painted anew."}
MOST_LISTED, LOOK_SECONDS, KEEP_ALIVE_SECONDS = 100, 0.1, 15.0
YEAR = 31_536_000
FOREVER = "public, max-age={}, immutable"
Identity = Annotated[str, PathField(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Of the job.")]
IdempotencyKey = Annotated[str | None, Header(
    alias="Idempotency-Key", max_length=255, pattern=r"^[\x21-\x7e]+$",
    description="Names this request: sent again with the same key, it gives the same job.")]
_FORM_BODY = form_schema(JobBody, FILES, ())
_EVENTS = {"schema": {"type": "string", "description": "Server-sent events: position {position}, step {step, total}, "
                      "preview {step, b64_json}, and at the end end with the job."}}


@router.post("/jobs", status_code=202, tags=["jobs"], summary="Accept a job", response_model=None,
             openapi_extra={"requestBody": {"required": True, "content": {
                 JSON: {"schema": JobBody.model_json_schema()}, FORM: {"schema": _FORM_BODY}}}},
             responses={202: {"model": JobAnswer, "description": "Accepted: it is on disk."},
                        **documented(400, 401, 404, 409, 413, 415, 429, 500, 503, 507)})
async def accept(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Takes a request to be carried out. When this answers, the job survives the end of the server."""
    body, files = await _received(request)
    service, owner = service_of(request), owner_of(request)
    service.check_open(journaled=True)
    fingerprint = sha256(json.dumps([body.model_dump(exclude={"image", "mask"}),
                                     {name: sha256(content) for name, content in files.items()}],
                                    sort_keys=True).encode())
    if idempotency_key is not None and (before := await asyncio.to_thread(
            service.store.accepted, owner, idempotency_key, fingerprint)) is not None:
        return await _accepted(request, before)  # whatever the queue and the client's rate say now
    order = await asyncio.to_thread(openai_order, service, body, files, owner)
    _check_room(service, await asyncio.to_thread(service.store.counts))
    service.rates.take(owner, body.n or 1)
    deadline = None if body.deadline_seconds is None else time.time() + body.deadline_seconds
    contents = {sha256(content): content for several in order.files.values() for content in several}

    def accepted() -> StoredJob:
        return service.store.accept(
            order.to_json(), model=order.model, owner=owner, priority=body.priority or 0, deadline=deadline,
            idempotency_key=idempotency_key, fingerprint=fingerprint if idempotency_key else None, files=contents)

    job = await asyncio.to_thread(accepted)
    noted(request, model=order.model, images=body.n or 1, job=job.id)
    return await _accepted(request, job)


async def _accepted(request: Request, job: StoredJob) -> Response:
    answer = await asyncio.to_thread(_answer, request, job)
    return Response(pydantic_core.to_json(answer), 202, {"Location": f"/v1/jobs/{job.id}"}, JSON)


async def _received(request: Request) -> tuple[JobBody, Files]:
    if request.headers.get("content-type", "").lower().startswith(FORM):
        return await form_body(request, JobBody, tuple(FILES))
    body = await json_body(request, JobBody)
    given = {name: getattr(body, name) for name in FILES if getattr(body, name) is not None}
    return body, await asyncio.to_thread(lambda: {name: from_base64(text, name) for name, text in given.items()})


def _check_room(service: Service, counts: dict[str, int]) -> None:
    """Refuse a job when as many wait as may.

    Raises:
        HttpError: 429 with the time in which one of them should be done, by the rate measured lately.
    """
    if (waiting := counts.get("queued", 0)) >= service.options.queue:
        rate = service.pool.status().images_per_second
        seconds = max(round(1 / rate), 1) if rate else 1
        raise HttpError(429, f"{waiting} jobs are waiting", code="queue_full", where="queue",
                        fix=f"ask again in {seconds} seconds", headers={"Retry-After": str(seconds)})


@router.get("/jobs", tags=["jobs"], summary="List jobs", response_model=None,
            responses={200: {"model": JobList}, **documented(400, 401, 500, 503)})
async def jobs(request: Request, limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
               after: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$",
                                                  description="Id of a job: only older ones.")] = None) -> Response:
    """The jobs of this key, the newest first."""
    service, owner = service_of(request), owner_of(request)

    def listed() -> dict[str, Any]:
        found = service.store.jobs(owner, most=limit + 1, before=after)
        return {"object": "list", "data": [_answer(request, job) for job in found[:limit]],
                "has_more": len(found) > limit}

    return Response(pydantic_core.to_json(await asyncio.to_thread(listed)), media_type=JSON)


@router.get("/jobs/{identity}", tags=["jobs"], summary="Look at a job", response_model=None,
            responses={200: {"model": JobAnswer}, **documented(400, 401, 404, 500, 503)})
async def job(request: Request, identity: Identity) -> Response:
    """How far a job is, and its images once it is completed."""
    store, owner = service_of(request).store, owner_of(request)
    answer = await asyncio.to_thread(lambda: _answer(request, store.job(identity, owner=owner)))
    return Response(pydantic_core.to_json(answer), media_type=JSON)


@router.delete("/jobs/{identity}", tags=["jobs"], summary="Cancel or forget a job", response_model=None,
               responses={200: {"model": JobAnswer}, **documented(400, 401, 404, 500, 503)})
async def cancel(request: Request, identity: Identity) -> Response:
    """Cancels a job that has not ended; one that has is forgotten, with its images."""
    store, owner = service_of(request).store, owner_of(request)

    def ended() -> dict[str, Any]:
        if store.cancel(identity, owner=owner):
            return _answer(request, store.job(identity, owner=owner))
        answer = _answer(request, store.job(identity, owner=owner))
        store.forget(identity, owner=owner)
        return answer

    return Response(pydantic_core.to_json(await asyncio.to_thread(ended)), media_type=JSON)


@router.get("/jobs/{identity}/events", tags=["jobs"], summary="Follow a job", response_model=None,
            responses={200: {"description": "Events until the job ends.", "content": {STREAM: _EVENTS}},
                       204: {"description": "The end was sent before: nothing follows."},
                       **documented(400, 401, 404, 500, 503)})
async def events(request: Request, identity: Identity, last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", max_length=64, description="The last that was seen.")] = None,
        ) -> Response:
    """Server-sent events of a job: position, step, preview, and end with the whole job.

    Every event says how things are, none what changed: who connects again, with or without Last-Event-ID, misses
    nothing.
    """
    service, owner = service_of(request), owner_of(request)
    found = await asyncio.to_thread(service.store.job, identity, owner=owner)
    if last_event_id == "end" and found.status in ENDED:
        return Response(status_code=204)  # tells an EventSource not to come again
    return StreamingResponse(_followed(request, service, identity, last_event_id or ""), media_type=STREAM,
                             headers=STREAM_HEADERS)


async def _followed(request: Request, service: Service, identity: str, seen: str) -> AsyncIterator[bytes]:
    """Events until the job ends, or the server does: then the client comes again to the next one."""
    store, owner, last, quiet = service.store, owner_of(request), JobProgress(""), time.monotonic()
    shown = int(seen.partition("-")[2]) if seen.startswith("preview-") and seen[8:].isdecimal() else 0
    try:
        while True:
            now = await asyncio.to_thread(store.progress, identity, owner=owner)
            for event in _news(last, now, shown):
                quiet = time.monotonic()
                yield event
            shown = max(shown, now.preview_step) if now.step else 0  # an attempt that starts again begins at 0
            if now.status in ENDED:
                answer = await asyncio.to_thread(lambda: _answer(request, store.job(identity, owner=owner)))
                yield format_sse_event(event="end", id="end", data_str=json.dumps(answer))
                return
            if service.state == "draining":
                return  # the client comes again, to the next server or this one's next start
            last = now
            if time.monotonic() - quiet > KEEP_ALIVE_SECONDS:
                quiet = time.monotonic()
                yield format_sse_event(comment="waiting")
            await asyncio.sleep(LOOK_SECONDS)
    except Exception as error:
        yield format_sse_event(event="error", data_str=json.dumps(failure_of(error).body()))


def _news(last: JobProgress, now: JobProgress, shown: int) -> list[bytes]:
    """Events for what is otherwise than it was."""
    found = []
    if now.status == "queued" and (last.status, last.position) != (now.status, now.position):
        found.append(format_sse_event(event="position", data_str=json.dumps({"position": now.position})))
    if now.step and (last.step, last.total) != (now.step, now.total):
        found.append(format_sse_event(event="step", id=f"step-{now.step}",
                                      data_str=json.dumps({"step": now.step, "total": now.total})))
    if now.preview is not None and now.preview_step > shown:
        values = {"step": now.preview_step, "b64_json": base64.b64encode(now.preview).decode()}
        found.append(format_sse_event(event="preview", id=f"preview-{now.preview_step}", data_str=json.dumps(values)))
    return found


def _answer(request: Request, job: StoredJob) -> dict[str, Any]:
    """A job as its client sees it. It asks the store, which may block."""
    store, fields = service_of(request).store, job.request["fields"]
    progress = JobProgress(job.status) if job.status in ENDED else store.progress(job.id, owner=job.owner)
    return {"id": job.id, "object": "job", "status": job.status, "model": job.model, "created_at": int(job.created),
            "ended_at": None if job.ended is None else int(job.ended), "position": progress.position,
            "step": progress.step, "total": progress.total, "attempts": job.attempts, "reason": job.reason or None,
            "digest": job.result.get("digest"), "seconds": job.result.get("seconds"),
            "request": {**fields, "files": job.request["files"], "output": job.request["output"]},
            "images": _images(request, job)}


def _images(request: Request, job: StoredJob) -> list[dict[str, Any]]:
    service, result = service_of(request), job.result
    model, looks = service.catalog.get(job.model), service.options.safety != "off"
    judged = result.get("judged", looks and model is not None and model.has_safety_checker)
    return [{"url": image_address(request, image.sha256, image.kind), "sha256": image.sha256, "kind": image.kind,
             "bytes": image.bytes, "seed": seed, "flagged": flagged if judged else None}
            for image, seed, flagged in zip(job.images, result.get("seeds", ()), result.get("flagged", ()),
                                            strict=False)]


@router.head("/images/{sha256}.{kind}", include_in_schema=False)
@router.get("/images/{sha256}.{kind}", tags=["images"], response_model=None, summary="Get an image", responses={
    200: {"description": "The image.", "content": {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                                                   for kind in get_args(Kind)}},
    304: {"description": "It is what the client has."}, **documented(400, 403, 404, 500, 503)})
async def image(request: Request, sha256: Annotated[str, PathField(pattern="^[0-9a-f]{64}$")], kind: Kind,
                until: Annotated[str, Query(description="From the image's address.", max_length=20)] = "",
                signature: Annotated[str, Query(description="From the image's address.", max_length=64)] = "",
                ) -> Response:
    """A stored image. Its address is signed unless the server runs with --public-images, and its content never
    changes: caches may keep it."""
    service, name = service_of(request), f"{sha256}.{kind}"
    left = YEAR if service.options.public_images else service.signer.check(name, until, signature)
    found = await asyncio.to_thread(service.store.image, sha256)
    if found is None or found[1] != kind:
        raise HttpError(404, "there is no such image, or it was forgotten", code="not_found")
    headers = {"ETag": f'"{sha256}"', "Cache-Control": FOREVER.format(min(int(left), YEAR)),
               "Content-Security-Policy": "default-src 'none'; sandbox", "Content-Type": f"image/{kind}"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(len(found[0]))})
    return Response(found[0], headers=headers)
