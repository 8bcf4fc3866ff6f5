"""`serve` and `serve-engine`: their options are the fields of `ServerOptions` and `EngineOptions`. Arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.cli.derived_options import Option, from_dataclass
from runtimes.errors import UnavailableError

REFERENCE = Path("build/reference-onnxruntime-fp32")


def serve_options() -> list[Option]:
    """The bundles, and every option of a server."""
    from runtimes.serving.options import ServerOptions

    return [Option("bundles", list[str], "bundles to serve: FOLDER, served under the folder's name, or NAME=FOLDER",
                   f"the reference model, built into {REFERENCE} if it is not there", argument="BUNDLE..."),
            *from_dataclass(ServerOptions)]


def serve_engine_options() -> list[Option]:
    """The server to join, the bundles, and every option of an engine."""
    from runtimes.serving.options import EngineOptions

    return [Option("server", str, "where the server takes engines: its host and --engine-port", argument="HOST:PORT",
                   required=True),
            Option("bundles", list[str], "bundles as the server serves them: FOLDER or NAME=FOLDER",
                   argument="BUNDLE...", required=True),
            *from_dataclass(EngineOptions)]


def serve(given: dict[str, Any]) -> None:
    """Serve bundles over HTTP: OpenAI's Images API, jobs that survive a crash, a studio page."""
    from deploy.cli import console
    from runtimes.serving.options import ServerOptions

    bundles = given.pop("bundles", None)
    options = ServerOptions(**as_tuples(given))
    _require("fastapi", "serve")
    if options.ray:
        _require("ray", "ray")
        from runtimes.serving.cluster.deployments import run as run_server
    else:
        from runtimes.serving.server import run as run_server
    run_server(bundles or [str(reference())], options, console.say)


def serve_engine(given: dict[str, Any]) -> None:
    """Run an engine for a server on another machine: it joins, and generates what the server sends."""
    from runtimes.serving.logs import set_up_logs
    from runtimes.serving.options import EngineOptions
    from runtimes.serving.workers.engine_process import join

    server, bundles = given.pop("server"), given.pop("bundles")
    options = EngineOptions(**as_tuples(given))
    set_up_logs(options.log_format)
    join(server, bundles, options)


def reference() -> Path:
    """The bundle of the reference model, built now if it is not there."""
    if not (REFERENCE / "manifest.json").is_file():
        from deploy import build
        from deploy.cli import console

        with console.shown_progress():
            build("reference", output=REFERENCE)
    return REFERENCE


def as_tuples(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line gives as lists, as dataclasses hold it."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{module} is not installed", where=f"the extra [{extra}]",
                               fix=f"pip install 'ldm-deploy[{extra}]'")
