"""The worker's side of `bench`'s messages, one JSON line in, one out, with the standard library alone.

    {"do": "generate", ...}  ->  {"seconds": 0.8, ...}  or  {"error": "..."}
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from runtimes.system.process_memory import peak_rss_bytes

Handler = Callable[..., dict[str, Any]]


def arguments(doc: str | None, *names: str) -> list[str]:
    """The arguments of a worker by their places; `--help` says what it is."""
    parser = argparse.ArgumentParser(description=doc, epilog="Started by a command that measures, not by hand.")
    for name in names:
        parser.add_argument(name)
    found = parser.parse_args()
    return [getattr(found, name) for name in names]


def serve(prepare: Callable[[], Mapping[str, Handler]]) -> None:
    """Prepare the contestant, say so, then answer requests until stdin closes.

    Args:
        prepare: loads everything; returns the handlers by name. Each takes the request's other keys.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not reach the conversation

    def answer(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            content = work()
        except Exception as error:
            traceback.print_exc()
            text = (str(error).strip().splitlines() or ["no message"])[0]
            content = {"error": f"{type(error).__name__}: {text[:300]}"}
        replies.write(json.dumps({**content, "peak_rss_bytes": peak_rss_bytes()}) + "\n")
        return "error" not in content

    handlers: dict[str, Handler] = {}

    def start() -> dict[str, Any]:
        began = time.perf_counter()
        handlers.update(prepare())
        return {"prepare_seconds": time.perf_counter() - began}

    if not answer(start):
        return
    for line in sys.stdin:
        request = json.loads(line)
        handler = handlers[request.pop("do")]
        answer(lambda handler=handler, request=request: handler(**request))  # type: ignore[misc]


def repeated(call: Callable[[], Any], times: int) -> dict[str, Any]:
    """Seconds of every call, after two that do not count."""
    seconds = []
    for _ in range(times + 2):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[2:]), "all": seconds[2:]}
