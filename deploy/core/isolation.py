"""Runs work on a large component in a process of its own: its memory is given back, and its death is one clear error.

The request and the answer are JSON. Small components run in the process that asks: a new one costs seconds of imports.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.plan import Pass, Step
from runtimes import errors
from runtimes.bundle.folder import Bundle, translated_disk_errors
from runtimes.bundle.manifest import Component, Manifest, from_json, to_json
from runtimes.errors import DeployError, UnavailableError
from runtimes.system.cache_root import cache_home, rooted
from runtimes.system.child_process import as_child, last_words, run_child
from runtimes.system.process_memory import children_peak_rss_bytes, peak_rss_bytes

ABOVE_BYTES = 256 << 20
REQUEST, ANSWER, LOG = "request.json", "answer.json", "log"


@dataclass(frozen=True)
class Result:
    """What a pass made of one component; the memory is that of the process that worked, or of one it started."""

    component: Component
    peak_rss_bytes: int


def is_large(step: Step, name: str, source: Bundle) -> bool:
    """Whether the networks that a component is made from are worth a process of their own."""
    components = source.manifest.components
    read = {file: record.bytes for other in step.reads[name] for file, record in components[other].files.items()}
    return sum(read.values()) > ABOVE_BYTES


def run_isolated(instance: Pass, step: Step, name: str, source: Bundle, out: Path) -> Result:
    """`instance.run(step, name, source, out)` in a child process.

    Raises:
        DeployError: as `call_isolated`; what the pass itself raised.
    """
    kind = type(instance)
    request = {"pass": f"{kind.__module__}:{kind.__qualname__}", "step": to_json(step), "name": name,
               "source": to_request(source), "out": str(out.resolve())}
    where = f"pass {step.pass_name}, {name}"
    content, peak = call_isolated("deploy.core.isolation:run_request", request, where)
    return Result(from_json(Component, content, where), peak)


def to_request(bundle: Bundle) -> dict[str, Any]:
    """A bundle as JSON, also one whose folder holds no manifest yet."""
    return {"path": str(bundle.path.resolve()), "manifest": to_json(bundle.manifest)}


def from_request(content: Mapping[str, Any]) -> Bundle:
    """The bundle that `to_request` made JSON of."""
    return Bundle(Path(content["path"]), from_json(Manifest, content["manifest"], "manifest"))


def call_isolated(function: str, request: Mapping[str, Any], where: str) -> tuple[Any, int]:
    """Call `module:function` with a request in a child process.

    Args:
        function: takes the request, returns something that JSON can hold.
        request: as JSON can hold it.
        where: of an error that names no place itself.

    Returns:
        what the function returned, and the child's highest resident memory in bytes.

    Raises:
        UnavailableError: the process was killed by a signal; says which, and what helps.
        DeployError: what the function itself raised, or a process that ended without an answer.
    """
    request = {"function": function, "request": request, "cache": str(cache_home().absolute())}
    with tempfile.TemporaryDirectory(prefix="ldm-deploy-") as temporary:
        folder = Path(temporary)
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        code = run_child("deploy.core.isolation", folder, folder / LOG)
        answer = folder / ANSWER
        if code != 0 or not answer.is_file():
            raise _died(code, folder / LOG, where)
        content = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in content:
        raise _as_error(content["error"], where)
    return content["result"], content["peak_rss_bytes"]


def _died(code: int, log: Path, where: str) -> DeployError:
    if code >= 0:
        return DeployError(f"the process ended with code {code}: {last_words(log)}", where=where)
    killed = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return UnavailableError(
            "the process was killed by the system, most likely because memory ran out (SIGKILL)", where=where,
            fix="close other programs, give smaller --shapes, or build on a machine with more memory; "
                "finished components are kept, and the same command goes on from here")
    return UnavailableError(f"the process was ended by {killed}: {last_words(log)}", where=where,
                            fix="run the same command again: it goes on from here; if it happens again, report it "
                                "with the model's configs")


def _as_error(content: Mapping[str, str], where: str) -> DeployError:
    kind: type[DeployError] = getattr(errors, content["kind"], DeployError)
    return kind(content["what"], where=content["where"] or where, fix=content["fix"])


def run_request(request: Mapping[str, Any]) -> Any:
    """What a child process does for `run_isolated`."""
    instance: Pass = _named(request["pass"])()
    step: Step = from_json(Step, request["step"], "step")
    component = instance.run(step, request["name"], from_request(request["source"]), Path(request["out"]))
    return to_json(component)


def _named(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _answer(content: Mapping[str, Any]) -> dict[str, Any]:
    try:
        cache = Path(content["cache"])
        with rooted(cache), translated_disk_errors(cache):
            result = _named(content["function"])(content["request"])
    except DeployError as error:
        return {"error": _error(type(error).__name__, error.what, error.where, error.fix)}
    except MemoryError:
        return {"error": _error("UnavailableError", "memory ran out", "", "close other programs, give smaller "
                                "--shapes, or build on a machine with more memory")}
    except Exception as error:
        traceback.print_exc()
        return {"error": _error("DeployError", f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.300}", "",
                               "")}
    return {"result": result, "peak_rss_bytes": max(peak_rss_bytes(), children_peak_rss_bytes())}


def _error(kind: str, what: str, where: str, fix: str) -> dict[str, str]:
    return {"kind": kind, "what": what, "where": where, "fix": fix}


def _main(folder: Path) -> None:
    with as_child():
        request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        partial = folder / f"{ANSWER}.partial"
        partial.write_text(json.dumps(_answer(request)), encoding="utf-8")
        partial.rename(folder / ANSWER)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
