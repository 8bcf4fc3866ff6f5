"""Where on this machine files of ours may lie that no bundle holds: bundles are read-only."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/ldm-deploy`, or `~/.cache/ldm-deploy`; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm-deploy"
