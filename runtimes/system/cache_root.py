"""Finds the folder on this machine where files may be cached outside bundles, which are read-only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_root: ContextVar[Path | None] = ContextVar("_root", default=None)


@contextmanager
def rooted(root: Path) -> Iterator[None]:
    """A context in which `cache_home` is this folder: that of the running build."""
    token = _root.set(root)
    try:
        yield
    finally:
        _root.reset(token)


def cache_home() -> Path:
    """The one folder of every cache; it need not be there.

    That of the running build, else `$LDM_DEPLOY_CACHE`, else `$XDG_CACHE_HOME/ldm-deploy`, else
    `~/.cache/ldm-deploy`. A variable that is empty counts as absent.
    """
    if (root := _root.get()) is not None:
        return root
    if own := os.environ.get("LDM_DEPLOY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ldm-deploy"
