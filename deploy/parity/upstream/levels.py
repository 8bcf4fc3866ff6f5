"""Runs the three levels that compare with diffusers itself, and reports them: figures, one clear error, JSON."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import runtimes
from deploy.parity.blame import different_facts, different_keys
from deploy.parity.components import open_candidate
from deploy.parity.reference.session_pool import SessionPool
from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.asked_requests import Asked
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle, sha256_of
from runtimes.errors import ParityError
from runtimes.pipeline.loading import scheduler_config

LEVELS = ("weights", "feeds", "images")
LEAST_PSNR_DB = 60.0  # what two float32 implementations of the same arithmetic reach


@dataclass(frozen=True)
class Level:
    """One level of a comparison with diffusers.

    Attributes:
        figures: what was compared and the worst of it, as JSON can hold it.
        different: what differs, one sentence each: what, both values, the likely cause.
        unverified: why something could not be compared, one sentence each.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    different: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What the manifest and `verify --json` say of it."""
        return {"ok": not self.different, **self.figures, "different": list(self.different),
                "unverified": list(self.unverified)}


Levels = Mapping[str, Level]


def enforce(levels: Levels, where: str) -> None:
    """Stop at the first level that differs.

    Args:
        levels: by name.
        where: pass or command.

    Raises:
        ParityError: naming the level, what differs, both values and the likely cause.
    """
    for name in LEVELS:
        if name in levels and levels[name].different:
            more = len(levels[name].different) - 1
            raise ParityError(levels[name].different[0] + (f"; {more} more" if more else ""),
                              where=f"{where}, {name} against diffusers",
                              fix="this is what diffusers does with this folder; report it with the model's configs")


def compare_source(upstream: Upstream, source: Bundle) -> dict[str, Level]:
    """Levels *weights* and *feeds* of a source bundle. Imports torch."""
    from deploy.parity.upstream.weights_level import compare_weights

    report = compare_weights(upstream, source)
    figures = {"tensors": report.tensors, "bytes": report.bytes, "adapted": report.adapted, "max_abs": report.max_abs}
    different = tuple(f"{part}, {key}: {what}" for part, key, what in report.different)
    return {"weights": Level(figures, different, tuple(report.unverified)),
            "feeds": compare_bundle_feeds(upstream, source, source)}


def compare_bundle_feeds(upstream: Upstream, source: Bundle, bundle: Bundle) -> Level:
    """Level *feeds* of a bundle's facts, tokenizers and scheduler. Imports torch."""
    from deploy.parity.reference.torch_sessions import reference_sessions
    from deploy.parity.upstream.feeds_level import compare_feeds

    report = compare_feeds(upstream, source, bundle, reference_sessions(source, capacity=1))
    figures = {"requests": report.requests, "relative_l2": report.relative_l2}
    unverified = tuple(f"{mode}: {why}" for mode, why in report.unverified.items())
    changed = "; ".join([*different_keys(scheduler_config(source), scheduler_config(bundle)),
                         *different_facts(source, bundle)]) if report.different else ""
    why = f"; what the bundle has changed of its source: {changed}" if changed else ""
    return Level(figures, tuple(f"{found}{why}" for found in report.different), unverified)


def compare_bundle_images(upstream: Upstream, source: Bundle, bundle: Bundle | None, requests: Sequence[Asked],
                          options: SessionOptions, least_db: float, *, one_at_a_time: bool) -> Level:
    """Level *images* of the source and, where it runs here, of a bundle. Imports torch.

    Args:
        upstream: the model as its user has it.
        source: the same model after the passes `load` and `adapters`.
        bundle: made from it; None where nothing here runs it.
        requests: what is generated.
        options: how the bundle runs.
        least_db: budget of the bundle's images.
        one_at_a_time: whether only one network of each side is in memory.
    """
    from deploy.parity.reference.torch_sessions import reference_sessions
    from deploy.parity.upstream.images_level import compare_images

    networks = reference_sessions(source, capacity=1 if one_at_a_time else None)
    pool = None
    if bundle is not None:
        parts = bundle.manifest.components
        pool = SessionPool(parts, lambda name: open_candidate(bundle, name, options),
                           1 if one_at_a_time else len(parts))
    try:
        report = compare_images(upstream, source, networks, requests, bundle, None if pool is None else pool.sessions)
    finally:
        if pool is not None:
            pool.close()
    return images_level(report.source_psnr_db, report.bundle_psnr_db, report.problems, report.unverified, least_db)


def images_level(source_psnr_db: Mapping[str, float], bundle_psnr_db: Mapping[str, float],
                 problems: Mapping[str, str], unverified: Mapping[str, str], least_bundle_db: float) -> Level:
    """Level *images* from what was measured.

    Args:
        source_psnr_db, bundle_psnr_db: request -> worst image of either against diffusers'.
        problems: request -> why ours does not generate what diffusers does.
        unverified: mode -> why nothing was compared.
        least_bundle_db: budget of the bundle's precision.
    """
    figures = {"source_psnr_db": _numbers(source_psnr_db), "bundle_psnr_db": _numbers(bundle_psnr_db),
               "source_budget_db": LEAST_PSNR_DB, "bundle_budget_db": least_bundle_db}
    different = [f"{request}: {why}; diffusers generates it" for request, why in problems.items()]
    for who, measured, least in (("our pipeline over PyTorch's networks", source_psnr_db, LEAST_PSNR_DB),
                                 ("the bundle", bundle_psnr_db, least_bundle_db)):
        different += [f"{request}: the image of {who} is {psnr:.1f} dB from diffusers', the least is {least:g} dB"
                      for request, psnr in measured.items() if not psnr >= least]
    return Level(figures, tuple(different), tuple(f"{mode}: {why}" for mode, why in unverified.items()))


def identity(upstream: Upstream) -> dict[str, Any]:
    """Everything besides weights and libraries that decides what is compared: the model's texts, and our own code."""
    files = {str(i): sha256_of(file) for i, file in enumerate(upstream.files())}
    scales = [[scale for _, scale in upstream.loras], [token for _, token in upstream.embeddings]]
    return {"files": files, "adapters": scales, "code": _code_digest()}


def _code_digest() -> str:
    """Digest of the code of the runtime and of the comparison: a proof by other code proves nothing."""
    digest = hashlib.sha256()
    for folder in (Path(runtimes.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def in_words(levels: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Each level for a person, from the JSON of all of them.

    Returns:
        name, what was compared with which result, and what could not be (empty where nothing is missing).
    """
    rows = []
    for name in LEVELS:
        if (found := levels.get(name)) is None:
            continue
        text = "; ".join(found["different"]) or _WORDS[name](found)
        rows.append((name, text, "; ".join(found["unverified"])))
    return rows


def _weights_in_words(found: Mapping[str, Any]) -> str:
    adapted = f", {found['adapted']} of them adapted, by at most {found['max_abs']:.1e}" if found["adapted"] else ""
    return f"{found['tensors']} tensors, {found['bytes'] / 1e6:.1f} MB, equal what diffusers loads{adapted}"


def _feeds_in_words(found: Mapping[str, Any]) -> str:
    if not found["requests"]:
        return "nothing was compared"
    worst = max(found["relative_l2"], key=lambda name: found["relative_l2"][name])
    return (f"{sum(found['requests'].values())} denoiser calls of {len(found['requests'])} requests equal diffusers', "
            f"relative L2 at most {found['relative_l2'][worst]:.1e} ({worst})")


def _images_in_words(found: Mapping[str, Any]) -> str:
    said = [f"{who} >= {min(values):.1f} dB" for who, key in (("ours at float32", "source_psnr_db"),
                                                            ("the bundle", "bundle_psnr_db"))
            if (values := [v for v in found.get(key, {}).values() if v is not None])]
    return f"{', '.join(said)} to diffusers' own ({', '.join(found['source_psnr_db'])})" if said else (
        "no image was compared")


_WORDS = {"weights": _weights_in_words, "feeds": _feeds_in_words, "images": _images_in_words}


def merged(levels: Levels, name: str, level: Level) -> dict[str, Level]:
    """`levels` with one more, or with what another bundle adds to it."""
    before = levels.get(name, Level())
    return {**levels, name: replace(level, unverified=tuple(dict.fromkeys((*before.unverified, *level.unverified))))}


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
