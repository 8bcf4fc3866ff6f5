"""Finds the command that builds a bundle of an older schema again, from whatever its manifest says; never raises."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

# Recorded options that `build` takes as they are, and those of files outside the model.
_PLAIN = ("variant", "revision", "target", "precision", "device")
_FILES = ("lora", "embedding", "vae")


def rebuild_command(raw: Mapping[str, Any]) -> str:
    """`python -m deploy build ...` for a manifest of any schema.

    Args:
        raw: the manifest as JSON has it.
    """
    spec, measured, source = (_object(raw.get(key)) for key in ("spec", "measured", "source"))
    model = measured.get("source_path") or source.get("id") or "MODEL"
    words = ["python", "-m", "deploy", "build", str(model)]
    for name in _PLAIN:
        if isinstance(value := spec.get(name, raw.get(name)), str) and value:
            words += [f"--{name}", value]
    if shapes := _object(spec.get("shapes")):
        words += ["--shapes", ",".join(f"{axis}={range_}" for axis, range_ in shapes.items())]
    words += [f"--{name.replace('_', '-')}" for name in ("step_cache", "safety_checker") if spec.get(name) is True]
    for name in _FILES:
        for file in _listed(_object(measured.get("adapters")).get(name)):
            words += [f"--{name}", file]
    return shlex.join(words)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> Iterator[str]:
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and part:
            yield part
