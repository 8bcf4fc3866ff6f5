"""The log of a server and of its workers: one line an event, as text or JSON, with the id of the request it belongs to.

Prompts, keys and the queries of addresses are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


class RequestIdFilter(logging.Filter):
    """Gives every record the id of the request during which it was written."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Nothing is left out."""
        record.request_id = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO access POST /v1/images/generations status=200 ... id=4f1c`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback if there is one."""
        fields = {**_fields(record), "id": getattr(record, "request_id", "")}
        said = " ".join(f"{name}={value}" for name, value in fields.items() if value not in ("", None))
        name = record.name.rpartition(".")[2]
        line = " ".join(filter(None, (_time(record), record.levelname, name, _one_line(record.getMessage()), said)))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, a traceback within it."""
        values = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name,
                  "message": record.getMessage(), "request_id": getattr(record, "request_id", "") or None,
                  **_fields(record)}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in values.items() if value is not None}, ensure_ascii=False,
                          default=str)


def set_up_logs(form: str, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Let every logger of the process write so; uvicorn's own access lines are left out, since ours say more.

    Args:
        form: "text" or "json".
        stream: standard error by default.
        level: from which on.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RequestIdFilter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], name != "uvicorn.access"
    for noisy in ("uvicorn.error", "python_multipart", "PIL", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "fields", {})
    return found


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _one_line(text: str) -> str:
    """Nobody writes a line of the log by a newline in an address."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
