"""How uvicorn talks to clients: bounds for headers, for the time of a request's arrival, and for connections."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import HANDLED_SIGNALS

MOST_HEAD = 1 << 16  # bytes of a request's line and headers: httptools itself has no bound
HEAD_SECONDS, BODY_SECONDS = 20.0, 120.0
TOO_LARGE = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain\r\ncontent-length: 0\r\n"
             b"connection: close\r\n\r\n")


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol over httptools, which closes connections whose request is too slow, or its head too large."""

    _head_bytes = 0
    _in_head = True
    _arrival: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here: its first request has to come soon."""
        super().connection_made(transport)
        self._await_within(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._await_within(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of it."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MOST_HEAD and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._in_head = True
        self._await_within(HEAD_SECONDS)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are here, its body follows."""
        self._in_head, self._head_bytes = False, 0
        self._await_within(BODY_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is here."""
        self._in_head = True
        self._await_within(None)
        super().on_message_complete()

    def _await_within(self, seconds: float | None) -> None:
        """Close the connection unless more comes within so many seconds; None waits for ever."""
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = None if seconds is None else self.loop.call_later(seconds, self.transport.close)


# Arguments of uvicorn.Config. A connection on which no request follows is closed after `timeout_keep_alive` seconds.
UVICORN: dict[str, Any] = {
    "http": BoundedProtocol, "ws": "none", "lifespan": "off", "timeout_keep_alive": 30, "limit_concurrency": 1024,
    "backlog": 512, "server_header": False, "proxy_headers": True, "access_log": False, "log_config": None,
}


class HttpServer(uvicorn.Server):
    """uvicorn, which says that it is asked to end before it waits for the requests that are under way."""

    def __init__(self, app: Any, *, on_end: Callable[[], None]) -> None:
        """Serve an ASGI application.

        Args:
            app: the application, which knows itself below which path a proxy shows it.
            on_end: called by the first signal, in the thread of the event loop.
        """
        super().__init__(uvicorn.Config(app, **UVICORN))
        self._on_end = on_end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which besides raises the signal again at the end: before anything else could be ended."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second gives up."""
        self._on_end()
        super().handle_exit(sig, frame)
