"""`cache` and `doctor`, the commands about this machine and no model. Arguments only."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli.derived_options import described
from runtimes.system import cache_store
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.cache_root import cache_home

app = typer.Typer(invoke_without_command=True, help="Show, trim or clear everything that is cached on this machine.")
Json = Annotated[bool, described("print one JSON object instead of text", "--json", default=False)]


@app.callback()
def cache(context: typer.Context, json: Json = False) -> None:
    """Show, trim or clear everything that is cached on this machine; without a command, show it."""
    if context.invoked_subcommand is None:
        show(json)


@app.command()
def show(json: Json = False) -> None:
    """Show what is cached, how large each kind is, in which folder, and the limit."""
    from deploy.cli import console

    root = cache_home()
    found = cache_store.summary(root)
    console.print_json(found) if json else console.show_cache(found)


@app.command()
def trim(
    limit: Annotated[str, described("bytes that may stay, such as 10GB or 0", default=(
        "$LDM_DEPLOY_CACHE_LIMIT, else half of the free disk and at most 50GB"))] = "",
    json: Json = False,
) -> None:
    """Remove what was used least recently, until the rest is within the limit."""
    _trim(parse_bytes(limit, "--limit", least=0) if limit else cache_store.limit_bytes(cache_home()), json)


@app.command()
def clear(json: Json = False) -> None:
    """Remove everything that no running build uses."""
    _trim(0, json)


def doctor(json: Json = False) -> None:
    """Show what this machine can build and run, and what is missing for the rest."""
    from deploy.cli import console
    from deploy.core.doctor import examine

    findings = examine()
    console.print_json(findings) if json else console.show_findings(findings)


def _trim(limit: int, json: bool) -> None:
    from deploy.cli import console

    done = cache_store.trim(cache_home(), limit)
    found = {"root": str(cache_home()), "limit_bytes": limit, "before_bytes": done.before_bytes,
             "bytes": done.after_bytes, "removed": done.removed}
    console.print_json(found) if json else console.show_trimmed(found)
