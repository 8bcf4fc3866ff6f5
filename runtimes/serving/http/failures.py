"""Every exception as an answer: a status, OpenAI's error object, and no path of the host."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from runtimes.errors import (
    BundleError,
    CancelledError,
    DeployError,
    InputError,
    OutOfMemoryError,
    ParityError,
    UnavailableError,
)
from runtimes.serving.engine.waiting import QueueFullError
from runtimes.serving.state.store import FullError, IdempotencyError, NoJobError

logger = logging.getLogger(__name__)

INVALID, SERVER = "invalid_request_error", "server_error"
PATH = re.compile(r"(?<![\w.:/<])(?:/[^\s/:;'\"(),<>]+){2,}/?|\b[A-Za-z]:\\[^\s'\"(),]+")
FIELD = re.compile(r"[A-Za-z_][\w.\[\]-]{0,63}")
TYPES = {400: INVALID, 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: INVALID, 409: "conflict_error", 413: INVALID, 415: INVALID, 421: INVALID, 422: INVALID,
         429: "rate_limit_error"}
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large",
         415: "unsupported_media_type"}


class ErrorObject(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str = Field(description="What is wrong and what to do about it.")
    type: str = Field(description="Kind of error.", examples=[INVALID])
    param: str | None = Field(description="Field of the request that it is about.")
    code: str | None = Field(description="Name of the error, for programs.", examples=["invalid_value"])


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorObject


class HttpError(DeployError):
    """An error of a request that has no meaning apart from HTTP."""

    def __init__(self, status: int, what: str, *, code: str, where: str = "", fix: str = "",
                 headers: Mapping[str, str] | None = None) -> None:
        """Say what is wrong, with a status and a name for programs."""
        super().__init__(what, where=where, fix=fix)
        self.status, self.code, self.headers = status, code, dict(headers or {})


@dataclass(frozen=True)
class Failure:
    """An exception as an answer.

    Attributes:
        status: of HTTP.
        error: the error object.
        headers: further ones.
    """

    status: int
    error: ErrorObject
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": self.error.model_dump()}

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


# The most special class first: what an exception is answered with, and its name for programs.
STATUSES: tuple[tuple[type[DeployError], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (FullError, 507, "disk_full"),
    (IdempotencyError, 409, "idempotency_conflict"),
    (NoJobError, 404, "job_not_found"),
    (BundleError, 500, "bundle_error"),
    (InputError, 400, "invalid_value"),
    (ParityError, 422, "not_finite"),
    (OutOfMemoryError, 503, "out_of_memory"),
    (UnavailableError, 503, "unavailable"),
    (CancelledError, 503, "cancelled"),
)


def failure_of(error: BaseException) -> Failure:
    """What an exception is answered with."""
    if isinstance(error, HttpError):
        message = f"{error.what}: {error.fix}" if error.fix else error.what
        return _failure(error.status, message, error.where, error.code, error.headers)
    if isinstance(error, DeployError):
        return _deploy_failure(error)
    if isinstance(error, RequestValidationError | ValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return _failure(error.status_code, str(error.detail), "", CODES.get(error.status_code, "error"),
                        error.headers or {})
    return _failure(500, "an error of the server; its log says more under the request's id", "", "internal_error", {})


def reason_of(error: BaseException) -> str:
    """The name of an error, for counting."""
    return failure_of(error).error.code or "error"


def _deploy_failure(error: DeployError) -> Failure:
    status, code = next(((status, code) for kind, status, code in STATUSES if isinstance(error, kind)),
                        (500, "internal_error"))
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    elif status == 503:
        headers["Retry-After"] = "1"
    # What a fix says of the machine is for who runs the server: it is logged, and not sent.
    message = f"{error.what} ({error.fix})" if error.fix and status < 500 else error.what
    return _failure(status, without_paths(message), error.where, code, headers)


def _invalid(error: RequestValidationError | ValidationError) -> Failure:
    """The first thing that pydantic found."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    name = re.sub(r"\.(int|float|str|bool|list\[.*|constrained-.*|literal\[.*)$", "", ".".join(place))
    if first["type"] == "extra_forbidden":
        return _failure(400, f"unknown field {name!r:.80}", name, "unknown_field", {})
    message = f"{name or 'the body'}: {first['msg']}"
    return _failure(400, message, name, "missing_field" if first["type"] == "missing" else "invalid_value", {})


def _failure(status: int, message: str, where: str, code: str, headers: Mapping[str, str]) -> Failure:
    kind = TYPES.get(status, SERVER if status >= 500 else INVALID)
    param = where if FIELD.fullmatch(where) else None
    return Failure(status, ErrorObject(message=message, type=kind, param=param, code=code), dict(headers))


def without_paths(text: str) -> str:
    """A message without the paths of this machine.

    >>> without_paths("/srv/bundles/emoji: broken (look at /var/log/x.log)")
    '...: broken (look at ...)'
    """
    return PATH.sub("...", text)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of every exception."""
    failure = failure_of(error)
    request.scope.setdefault("state", {})["reason"] = failure.error.code
    if failure.status >= 500:
        trace = error if not isinstance(error, DeployError) else None
        logger.error("%s", error if isinstance(error, DeployError) else "an error of the server", exc_info=trace)
    return failure.response()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers for the OpenAPI page."""
    examples = {
        400: ("a field or file that cannot be used", "size 100x100 is not made by emoji", "size", "invalid_value"),
        401: ("no key, or a wrong one", "a key is needed", None, "invalid_api_key"),
        403: ("not allowed, as an image address whose signature is wrong", "the signature is wrong", None, "forbidden"),
        404: ("there is no such thing", "no model 'x'", "model", "model_not_found"),
        405: ("another method is needed", "Method Not Allowed", None, "method_not_allowed"),
        409: ("the idempotency key came with another request", "this key was used for another request", None,
              "idempotency_conflict"),
        413: ("the body is too large", "Content Too Large", None, "request_too_large"),
        415: ("not the type of body that is read here", "send application/json", None, "unsupported_media_type"),
        421: ("the Host is not this machine, and no key is asked for", "the host 'x' is not this machine", None,
              "wrong_host"),
        422: ("the images are not finite numbers: an extreme value", "the latents are not finite", None, "not_finite"),
        429: ("too many requests: Retry-After says when to come again", "256 requests are waiting", None, "queue_full"),
        500: ("an error of the server", "an error of the server", None, "internal_error"),
        503: ("starting, shutting down, or without a worker", "the engine is shutting down", None, "unavailable"),
        507: ("the disk is full; nothing that was accepted is lost", "the disk is full", None, "disk_full"),
    }
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description, message, param, code = examples[status]
        example = _failure(status, message, param or "", code, {}).body()
        found[status] = {"model": ErrorAnswer, "description": description.capitalize() + ".",
                         "content": {"application/json": {"example": example}}}
    return found
