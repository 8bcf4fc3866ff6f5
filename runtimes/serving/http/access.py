"""What surrounds every request: its id and its line in the log, who may come in, addresses as the client sees them."""

from __future__ import annotations

import logging
import re
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtimes.serving.http.failures import HttpError, failure_of
from runtimes.serving.http.keys import loopback_host
from runtimes.serving.http.observed import log_access, request_id
from runtimes.serving.http.running import ClientGone
from runtimes.serving.http.service import Service
from runtimes.serving.logs import REQUEST_ID
from runtimes.serving.options import LOOPBACK

logger = logging.getLogger(__name__)

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:[0-9]{1,5})?")
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")
# Anybody may read: the page and its files, the description of the API, and what probes ask. Images are signed.
OPEN = ("/", "/openapi.json", "/docs", "/favicon.ico", "/health/live", "/health/ready")
OPEN_BELOW = ("/studio/", "/v1/images/")
CLIENT_GONE = 499


class _Exchange:
    """What is received, within the limit, and what is sent, with the headers that every answer has."""

    def __init__(self, receive: Receive, send: Send, identity: str, headers: Headers, most: int) -> None:
        self._receive, self._send, self._identity, self._most = receive, send, identity, most
        self._unread = "content-length" in headers or "transfer-encoding" in headers
        self._length, self._received = headers.get("content-length", ""), 0
        self.status, self.started = CLIENT_GONE, False

    async def receive(self) -> Message:
        """A part of the body; what is too large is refused before it is read, or as soon as it shows.

        Raises:
            HttpError: 413.
        """
        if self._length.isdecimal() and int(self._length[:20]) > self._most:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._most:
                raise self._too_large()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the body has more than {self._most:,} bytes", code="request_too_large",
                         fix="send less, or start the server with a larger --max-body")

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._identity
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("Referrer-Policy", "no-referrer")
            if self._unread:  # the rest of the body is not waited for
                headers["Connection"] = "close"
        await self._send(message)


class Surroundings:
    """The outermost layer: an ASGI application around another."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Surround an application."""
        self._app, self._service = app, service
        self._root = service.options.root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        identity = request_id(headers.get("x-request-id"))
        token = REQUEST_ID.set(identity)
        self._place(scope)
        notes: dict[str, Any] = {}
        scope.setdefault("state", {})["noted"] = notes
        exchange = _Exchange(receive, send, identity, headers, self._service.max_body)
        try:
            await self._entered(scope, headers, exchange.receive, exchange.send)
        except ClientGone:
            pass
        except Exception as error:
            if not await self._failed(scope, exchange, error):
                raise
        finally:
            self._ended(scope, exchange.status, time.perf_counter() - began, notes)
            REQUEST_ID.reset(token)

    @staticmethod
    async def _failed(scope: Scope, exchange: _Exchange, error: Exception) -> bool:
        """A fault of ours: the log has all of it, the client nothing but that. Whether it could be answered."""
        logger.error("an error of the server", exc_info=error)
        scope["state"]["reason"] = "internal_error"
        if exchange.started:
            return False
        await failure_of(error).response()(scope, exchange.receive, exchange.send)
        return True

    def _place(self, scope: Scope) -> None:
        """Below the proxy's path, whether the proxy removes it from addresses or leaves it."""
        if root := self._root:
            path = scope["path"]
            if path != root and not path.startswith(f"{root}/"):
                path = root + path
            scope["path"], scope["root_path"] = path, root
            scope.pop("raw_path", None)

    async def _entered(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        try:
            scope["state"]["owner"] = self._admitted(scope, headers)
        except HttpError as error:
            scope["state"]["reason"] = error.code
            await failure_of(error).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admitted(self, scope: Scope, headers: Headers) -> str:
        """The owner of the request's key.

        Raises:
            HttpError: 401, or 403 for another site's page, or 421 for a name that is not this machine's.
        """
        service, path = self._service, scope["path"].removeprefix(self._root) or "/"
        if path.startswith("/health/"):
            return ""
        options = service.options
        if not service.keys and options.host in LOOPBACK and not self._root:
            # A page of another site whose name was made to mean this machine would otherwise be its own.
            if not loopback_host(headers.get("host", "")):
                raise HttpError(421, f"the host {headers.get('host', '')!r:.80} is not this machine, and no key is "
                                "asked for", code="wrong_host", fix="start the server with --api-key-file or "
                                "--root-path")
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin not in options.cors:
            hosts = {headers.get("host", ""), headers.get("x-forwarded-host", "")} - {""}
            if urlsplit(origin).netloc not in hosts:
                raise HttpError(403, f"pages of {origin!r:.120} may not use this server", code="forbidden",
                                fix="start the server with --cors ORIGIN")
        if path in OPEN or path.startswith(OPEN_BELOW[0]) or (
                path.startswith(OPEN_BELOW[1]) and scope["method"] in ("GET", "HEAD")) or scope["method"] == "OPTIONS":
            return ""
        return service.keys.owner(headers.get("authorization"))

    def _ended(self, scope: Scope, status: int, seconds: float, notes: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(route, scope["method"] if route != "other" else "any", str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        if not route.startswith("/health/"):
            log_access(scope["method"], scope["path"], status, seconds, owner=scope["state"].get("owner") or None,
                       reason=scope["state"].get("reason"), **notes)


def service_of(request: Request) -> Service:
    """The service that an application was made of."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Whose key a request came with."""
    return str(request.scope["state"].get("owner", ""))


def noted(request: Request, **fields: Any) -> None:
    """Say something of a request in its line of the log."""
    request.scope["state"]["noted"].update(fields)


def base_url(request: Request) -> str:
    """Where the client reaches this server, its proxy's name, scheme and path included, without a slash at the end."""
    headers, root = request.headers, str(request.scope.get("root_path", "")).rstrip("/")
    host = headers.get("x-forwarded-host", "").split(",")[0].strip() or headers.get("host", "")
    if not HOST.fullmatch(host):
        server = request.scope.get("server") or ("127.0.0.1", None)
        host = f"{server[0]}:{server[1]}" if server[1] else str(server[0])
    scheme = headers.get("x-forwarded-proto", "").split(",")[0].strip().lower() or request.scope["scheme"]
    prefix = headers.get("x-forwarded-prefix", "").rstrip("/")
    if not root and PREFIX.fullmatch(prefix):
        root = prefix
    return f"{'https' if scheme == 'https' else 'http'}://{host}{root}"


def image_address(request: Request, sha256: str, kind: str) -> str:
    """The address of a stored image, signed unless images are public."""
    service, name = service_of(request), f"{sha256}.{kind}"
    query = "" if service.options.public_images else f"?{service.signer.query(name)}"
    return f"{base_url(request)}/v1/images/{name}{query}"
