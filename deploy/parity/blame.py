"""Names what besides the networks makes two pipelines generate differently: scheduler, tokenizer, facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.parity.metrics import relative_l2
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import to_json
from runtimes.errors import InputError
from runtimes.pipeline.loading import load_tokenizers
from runtimes.schedulers import from_config
from runtimes.schedulers.settings import Settings

SCHEDULE_TOLERANCE = 1e-6  # both noise schedules come from the same code: equal coefficients give equal numbers


def different_keys(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    """Keys of two scheduler configs that differ, as `key: value -> value`; diffusers' notes (`_...`) do not count."""
    keys = sorted(k for k in {*reference, *candidate} if not k.startswith("_") or k == "_class_name")
    return [f"{k}: {reference.get(k)!r} -> {candidate.get(k)!r}" for k in keys if reference.get(k) != candidate.get(k)]


def schedule_error(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> float:
    """relative L2 of `alphas_cumprod` of two scheduler configs; infinite if their lengths differ."""
    tables = [_alphas(config) for config in (reference, candidate)]
    return relative_l2(*tables) if tables[0].shape == tables[1].shape else float("inf")


def _alphas(config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    try:
        scheduler: Any = from_config(config)
    except InputError:  # a class that we have no sampler for: its noise schedule can be read all the same
        scheduler = Settings.from_config(config)
    alphas: np.ndarray[Any, Any] = scheduler.alphas_cumprod
    return alphas


def different_facts(reference: Bundle, candidate: Bundle) -> list[str]:
    """Facts of the pipelines' roles that differ, as `codec.scaling_factor: value -> value`."""
    before, after = (dict(_leaves(to_json(b.manifest.pipeline), "")) for b in (reference, candidate))
    return [f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in {**before, **after}
            if before.get(name) != after.get(name)]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value of nested JSON with the path to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, part in items:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def different_tokens(reference: Bundle, candidate: Bundle, prompts: Sequence[str]) -> list[str]:
    """Prompts that the two tokenizers turn into different ids.

    Raises:
        BundleError: a tokenizer cannot be read.
    """
    lengths = [[reader.tokens for reader in b.manifest.pipeline.conditioner.encoders] for b in (reference, candidate)]
    if lengths[0] != lengths[1]:
        return list(prompts)
    texts, pairs = [*prompts, ""], zip(load_tokenizers(reference), load_tokenizers(candidate), strict=True)
    ids = [(one(texts), other(texts)) for one, other in pairs]
    return [text for row, text in enumerate(texts) if any(not np.array_equal(r[row], c[row]) for r, c in ids)]
