"""Prompts to embeddings: tokenize, look up, and run the text encoder for what is new."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtimes.batching import run_rows
from runtimes.prompt_cache import PromptCache
from runtimes.session import Session

Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]


def embed(texts: Sequence[str], tokenize: Tokenize, encoder: Session, cache: PromptCache) -> NDArray[np.float32]:
    """Embed prompts.

    Every distinct prompt is encoded in a call of its own: an embedding must not depend on which prompts it happened to
    share a batch with, or a cached one would make an image depend on the calls before.

    Args:
        texts: one per image; repetitions cost nothing.
        tokenize: (B,) strings -> (B, tokens) int64.
        encoder: input_ids -> last_hidden_state.
        cache: shared between calls.

    Returns:
        (len(texts), tokens, width) float32.
    """
    distinct = list(dict.fromkeys(texts))
    found: dict[str, NDArray[np.float32]] = {}
    for text, ids in zip(distinct, tokenize(distinct), strict=True):
        key = ids.tobytes()
        row = cache.get(key)
        if row is None:
            row = run_rows(encoder, {"input_ids": ids[None]}, "last_hidden_state")[0].astype(np.float32)
            cache.put(key, row)
        found[text] = row
    return np.stack([found[text] for text in texts])
