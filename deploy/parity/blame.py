"""Names what besides the networks makes two pipelines generate differently: scheduler, tokenizer, facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.parity.metrics import relative_l2
from runtimes.bundle.folder import Bundle
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
    """Facts of the pipelines that differ, as `name: value -> value`."""
    before, after = (dataclasses.asdict(b.manifest.pipeline) for b in (reference, candidate))
    return [f"{name}: {value!r} -> {after[name]!r}" for name, value in before.items() if after[name] != value]


def different_tokens(reference: Bundle, candidate: Bundle, prompts: Sequence[str]) -> list[str]:
    """Prompts that the two tokenizers turn into different ids.

    Raises:
        BundleError: a tokenizer cannot be read.
    """
    if reference.manifest.pipeline.tokens != candidate.manifest.pipeline.tokens:
        return list(prompts)
    texts, pairs = [*prompts, ""], zip(load_tokenizers(reference), load_tokenizers(candidate), strict=True)
    ids = [(one(texts), other(texts)) for one, other in pairs]
    return [text for row, text in enumerate(texts) if any(not np.array_equal(r[row], c[row]) for r, c in ids)]
