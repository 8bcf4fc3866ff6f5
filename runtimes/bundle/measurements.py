"""Types of a manifest's parts without a fixed schema: figures of parity, measurements.

They may hold more than this, which nobody reads. What is here and has another type is refused when the bundle is
opened, by its key path, and not met later by whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtimes.errors import BundleError

ANY_KEY = "*"
LARGEST = 1 << 63
NUMBER, OPTIONAL_NUMBER = (int, float), (int, float, type(None))
# A type or several, a list of one kind, or an object: key -> kind, ANY_KEY for all others.
Kind = Any

COMPONENT_PARITY: Kind = {
    "relative_l2": OPTIONAL_NUMBER, "max_abs": OPTIONAL_NUMBER, "cosine": OPTIONAL_NUMBER, "nonfinite": int,
    "budget": NUMBER, "ok": bool, "shapes": [[int]], "worst_output": str, "worst_shape": [int],
}
PARITY: Kind = {
    "ok": bool, "components": {ANY_KEY: COMPONENT_PARITY},
    "trajectory": {"relative_l2": [OPTIONAL_NUMBER], "by_scheduler": {ANY_KEY: [OPTIONAL_NUMBER]}},
    "images": {"count": int, "psnr_db": OPTIONAL_NUMBER, "psnr_db_mean": OPTIONAL_NUMBER, "ssim": OPTIONAL_NUMBER,
               "ssim_mean": OPTIONAL_NUMBER},
    "retrieval": {"bundle": NUMBER, "reference": NUMBER}, "unverified": [str], "broken": [str],
    "compared": {"level": str, "text": str}, "budget": {ANY_KEY: NUMBER},
}
REQUIRED_PARITY = {"images": ("count", "psnr_db", "ssim"), "retrieval": ("bundle", "reference"),
                   "compared": ("level", "text")}
NULLABLE = ("retrieval", "images", "culprit")
PASS: Kind = {"name": str, "seconds": NUMBER, "peak_rss_bytes": int, "reused": int, "bytes_in": int, "bytes_out": int,
              "seconds_without_cache": NUMBER, "relative_l2": {ANY_KEY: OPTIONAL_NUMBER},
              "components": {ANY_KEY: {"seconds": NUMBER, "bytes": int, "peak_rss_bytes": int}},
              "gain": {ANY_KEY: {"bytes_ratio": NUMBER, "seconds_ratio": NUMBER, "verdict": str}}}
CANDIDATE: Kind = {"prune": NUMBER, "bytes": int, "macs": NUMBER, "seconds": OPTIONAL_NUMBER,
                   "trajectory_relative_l2": OPTIONAL_NUMBER, "psnr_db": OPTIONAL_NUMBER, "ssim": OPTIONAL_NUMBER,
                   "retrieval": OPTIONAL_NUMBER, "broken": str}
BATCH: Kind = {"exact": bool, "fixed": bool, "decibels": NUMBER, "rows": [int], "sizes": {ANY_KEY: int},
               "runtime": str}
MEASURED: Kind = {"passes": [PASS], "prune_candidates": [CANDIDATE], "build_key": str, "built_at": str, "host": str,
                  "source_path": str, "adapters": {"lora": [str], "embedding": [str], "vae": str},
                  "batch": {ANY_KEY: BATCH}}
REQUIRED = {"passes": ("name", "seconds", "peak_rss_bytes", "bytes_in", "bytes_out", "components"),
            "prune_candidates": tuple(CANDIDATE)}


def check_component_parity(value: Mapping[str, Any] | None, where: str) -> None:
    """Figures of one component; an empty object says that it was compared elsewhere."""
    if value:
        _check(value, COMPONENT_PARITY, where)
        _require(value, ("relative_l2",), where)


def check_parity(value: Mapping[str, Any] | None, where: str) -> None:
    """Figures of the whole bundle."""
    given = {key: part for key, part in (value or {}).items() if part is not None or key not in NULLABLE}
    _check(given, PARITY, where)
    for key, required in REQUIRED_PARITY.items():
        if key in given:
            _require(given[key], required, f"{where}.{key}")


def check_measured(value: Mapping[str, Any], where: str) -> None:
    """Measurements, without the files, which are records of their own."""
    _check(value, MEASURED, where)
    for key, required in REQUIRED.items():
        for index, entry in enumerate(value.get(key, ())):
            _require(entry, required, f"{where}.{key}[{index}]")
    for index, entry in enumerate(value.get("passes", ())):
        for name, cost in entry["components"].items():
            _require(cost, ("seconds", "bytes", "peak_rss_bytes"), f"{where}.passes[{index}].components.{name}")
        for name, gain in entry.get("gain", {}).items():
            _require(gain, ("bytes_ratio", "verdict"), f"{where}.passes[{index}].gain.{name}")
    for name, fact in value.get("batch", {}).items():
        _require(fact, ("exact", "fixed", "runtime"), f"{where}.batch.{name}")


def _check(value: Any, kind: Kind, where: str) -> None:
    if isinstance(kind, dict):
        _expect(isinstance(value, Mapping), "an object", value, where)
        for key, part in value.items():
            expected = kind.get(key, kind.get(ANY_KEY))
            if expected is not None:
                _check(part, expected, f"{where}.{key}")
    elif isinstance(kind, list):
        _expect(isinstance(value, list | tuple), "a list", value, where)
        for index, part in enumerate(value):
            _check(part, kind[0], f"{where}[{index}]")
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = object in kinds or type(value) in kinds
        _expect(fits, " or ".join(k.__name__ for k in kinds), value, where)
        _expect(not isinstance(value, float) or math.isfinite(value), "a finite number", value, where)
        _expect(not isinstance(value, int) or abs(value) < LARGEST, "a number of 64 bits", "a larger one", where)


def _require(value: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if missing := [key for key in keys if key not in value]:
        raise BundleError(f"missing {', '.join(missing)}", where=where, fix="build the bundle again")


def _expect(fits: bool, what: str, value: object, where: str) -> None:
    if not fits:
        raise BundleError(f"expected {what}, found {value!r:.60}", where=where, fix="build the bundle again")
