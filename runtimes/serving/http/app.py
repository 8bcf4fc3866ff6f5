"""`create_app`: the routes of a `Service` as an ASGI application; health, metrics, the studio page, the API's page.

uvicorn runs it with `connections.UVICORN`, whose bounds of headers, connections and time are part of the limits.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import mimetypes
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runtimes.errors import DeployError
from runtimes.serving.http import images_api, jobs_api, sdapi
from runtimes.serving.http.access import Surroundings, service_of
from runtimes.serving.http.failures import HttpError, answer_error, documented
from runtimes.serving.http.observed import CONTENT_TYPE, telemetry
from runtimes.serving.http.service import Service

STUDIO = Path(__file__).resolve().parents[1] / "studio"
STYLE = ("body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light "
         "dark}table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{border:1px solid #8886;padding:.3rem;"
         "text-align:left;vertical-align:top;overflow-wrap:anywhere}pre{white-space:pre-wrap}")
PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
               "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
TITLE = "ldm-deploy"
DESCRIPTION = """Generates images with bundles of latent diffusion models.

* `/v1/images/...` and `/v1/models`: OpenAI's Images API; the official clients work unmodified.
* `/v1/jobs`: requests that survive the end of the server, followed by server-sent events.
* `/sdapi/v1/...`: as far as clients of AUTOMATIC1111's web UI need it.

Every error is OpenAI's error object. Every answer has an `X-Request-ID`, which is in the server's log."""
operations = APIRouter(tags=["operations"])


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves everything.

    Args:
        service: the parts of the server; its `state` may change while it serves.
    """
    app = FastAPI(title=TITLE, description=DESCRIPTION, version=metadata.version("ldm-deploy"), docs_url=None,
                  redoc_url=None, middleware=_layers(service),
                  telemetry=telemetry(service.options.telemetry, TITLE), redirect_slashes=False, openapi_tags=[
                      {"name": "images"}, {"name": "jobs"}, {"name": "models"}, {"name": "sdapi"},
                      {"name": "operations"}])
    app.state.service = service
    for kind in (HTTPException, RequestValidationError, ValidationError, DeployError):
        app.add_exception_handler(kind, answer_error)
    for router in (images_api.router, jobs_api.router, sdapi.router, operations):
        app.include_router(router)
    return app


def _layers(service: Service) -> list[Middleware]:
    layers = [Middleware(Surroundings, service=service)]
    if service.options.cors:
        cross = Middleware(CORSMiddleware, allow_origins=list(service.options.cors),
                           allow_methods=["GET", "POST", "DELETE"],
                           allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
                           expose_headers=["X-Request-ID", "Retry-After", "Location"])
        layers.insert(0, cross)  # errors of what it surrounds can then be read by the page
    return layers


# ---- health and metrics ------------------------------------------------------------------------------------------


@operations.get("/health/live", summary="Whether the process answers", response_model=dict[str, str])
async def live() -> Response:
    """Always 200: a server that does not answer this must be started again."""
    return JSONResponse({"status": "live"})


@operations.get("/health/ready", summary="Whether it takes requests", response_model=dict[str, str],
                responses={503: {"description": "Starting, shutting down, or no worker lives.",
                                 "model": dict[str, str]}})
async def ready(request: Request) -> Response:
    """200 while requests are taken; 503 while starting, shutting down, or without a worker."""
    service = service_of(request)
    state = service.state
    if state == "serving":
        workers = (await asyncio.to_thread(service.pool.status)).workers
        state = "ready" if any(worker.alive for worker in workers) else "no worker lives"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@operations.get("/metrics", summary="Figures for Prometheus", response_model=None, responses={
    200: {"description": "Text in Prometheus' form.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **documented(401, 500)})
async def metrics(request: Request) -> Response:
    """Queue, waits, service, batches, steps, caches, memory, failures by reason."""
    text = await asyncio.to_thread(service_of(request).metrics.text)
    return Response(text, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})


# ---- pages -------------------------------------------------------------------------------------------------------


@operations.get("/", include_in_schema=False)
@operations.get("/studio/{path:path}", include_in_schema=False)
async def studio(request: Request, path: str = "index.html") -> Response:
    """A file of the studio page."""
    content = await asyncio.to_thread(_studio_file, path)
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY,
               "Content-Type": _type_of(path)}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)


@operations.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The description of the API as a page without scripts, which needs no network; /openapi.json has all of it."""
    app: FastAPI = request.app
    page = await asyncio.to_thread(_docs_page, app.openapi())
    allowed = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return Response(page, headers={"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache",
                                   "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{allowed}'"})


def _docs_page(description: dict[str, Any]) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
             f"<title>{TITLE}</title><style>{STYLE}</style><h1>{TITLE} {escape(description['info']['version'])}</h1>"
             f"<pre>{escape(DESCRIPTION)}</pre><p>All of it, for programs: <a href=openapi.json>openapi.json</a>"]
    for path, methods in description["paths"].items():
        for method, said in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(said.get('description', ''))}")
            rows = [(field["name"], field["schema"], field.get("description", ""), field.get("required", False))
                    for field in said.get("parameters", ())]
            for kind, content in said.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>Body: {escape(kind)}")
                rows += [(name, schema, schema.get("description", ""), name in content["schema"].get("required", ()))
                         for name, schema in content["schema"].get("properties", {}).items()]
            parts.append(_table(("field", "type", ""), [
                (name + (" *" if required else ""), _type(schema), text) for name, schema, text, required in rows]))
            parts.append(_table(("status", "", "example"), [
                (status, answer.get("description", ""), json.dumps(answer.get("content", {}).get(
                    "application/json", {}).get("example", "")).strip('"'))
                for status, answer in said["responses"].items()]))
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}' for cell in head)}{lines}</table>"


def _type(schema: dict[str, Any]) -> str:
    """In words: "integer, 1 to 64"."""
    choices = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    found = []
    for part in choices:
        text = " | ".join(map(str, part["enum"])) if "enum" in part else str(part.get("const", part.get("type", "")))
        limits = [f"{word} {part[key]}" for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"),
                                                          ("maximum", "to")) if key in part]
        found.append(" ".join([text, *limits]))
    return " or ".join(found)


def _studio_file(path: str) -> bytes:
    """Only what lies in the folder, whatever a path says.

    Raises:
        HttpError: 404.
    """
    with contextlib.suppress(ValueError, OSError):  # a NUL in it, or a name that is too long
        file = (STUDIO / path).resolve()
        if file.is_relative_to(STUDIO) and file.is_file():
            return file.read_bytes()
    raise HttpError(404, "there is no such page", code="not_found")


def _type_of(path: str) -> str:
    kind = {".js": "text/javascript"}.get(Path(path).suffix) or mimetypes.guess_type(path)[0] or "text/plain"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
