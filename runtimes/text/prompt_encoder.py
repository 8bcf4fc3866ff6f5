"""Prompts to embeddings: tokenize, look up, and run the text encoder for what is new."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import run_rows
from runtimes.backends.session import Session
from runtimes.errors import InputError
from runtimes.text import prompt_weighting
from runtimes.text.clip_tokenizer import ClipTokenizer
from runtimes.text.prompt_cache import PromptCache

Tokenize = Callable[[Sequence[str]], NDArray[np.int64]]
Float32 = NDArray[np.float32]
MAX_WINDOWS = 32
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptStyle:
    """How a prompt is read. By default as diffusers reads it: brackets are text, and what is too long is cut.

    Attributes:
        weighting: `(word:1.3)`, `(word)` and `[word]` weigh words; see `runtimes.text.prompt_weighting`.
        long_prompts: a prompt of more tokens than the text encoder takes is read in windows.
    """

    weighting: bool = False
    long_prompts: bool = False


class Embedder:
    """Prompts of one call to embeddings.

    Every window of every prompt is encoded in a call of its own: an embedding must not depend on which prompts it
    happened to share a batch with, or a cached one would make an image depend on the calls before.
    """

    def __init__(self, tokenizer: Tokenize, encoder: Session, cache: PromptCache, style: PromptStyle) -> None:
        """Remember the parts.

        Args:
            tokenizer: (B,) strings -> (B, tokens) int64; a `ClipTokenizer` where the style is not the default.
            encoder: input_ids -> hidden states as its first output, and text_embeds if it pools.
            cache: shared between calls.
            style: how prompts are read.
        """
        self._tokenizer, self._encoder, self._cache, self._style = tokenizer, encoder, cache, style

    def pair(self, prompts: Sequence[str], negatives: Sequence[str]) -> tuple[list[Float32], list[Float32] | None]:
        """The prompts' embeddings, and the negative prompts' or None without any; both of an image are equally long.

        The shorter one is followed by windows of the empty prompt.

        Returns:
            (tokens, width) float32 for every image; tokens is that of the text encoder times the number of windows.
        """
        cond = self._all(prompts)
        if not negatives:
            return cond, None
        uncond = self._all(negatives)
        for i, (a, b) in enumerate(zip(cond, uncond, strict=True)):
            longest = max(len(a), len(b))
            cond[i], uncond[i] = self._padded(a, longest), self._padded(b, longest)
        return cond, uncond

    def _all(self, texts: Sequence[str]) -> list[Float32]:
        distinct = list(dict.fromkeys(texts))
        if self._style == PromptStyle():
            rows = [self._encoded(ids) for ids in self._tokenizer(distinct)]
        else:
            rows = [self._read(text) for text in distinct]
        found = dict(zip(distinct, rows, strict=True))
        return [found[text] for text in texts]

    def _read(self, text: str) -> Float32:
        """One prompt in windows, its words weighted: (tokens * windows, width) float32.

        A weight moves a token's embedding along the line from the empty prompt's at the same place, as ComfyUI does:
        weight 1 changes nothing, weight 0 takes the word's influence away, and no mean has to be restored.
        """
        if not isinstance(self._tokenizer, ClipTokenizer):
            raise InputError("this pipeline's tokenizer reads plain prompts only", where="prompt",
                             fix="leave prompt weighting and long prompts off")
        windows = self._tokenizer.windows(prompt_weighting.parse(text) if self._style.weighting else [(text, 1.0)])
        if len(windows) > 1 and not self._style.long_prompts:
            logger.warning("the prompt needs %d windows of %d tokens; all but the first are cut",
                           len(windows), self._tokenizer.tokens)
            windows = windows[:1]
        if len(windows) > MAX_WINDOWS:
            raise InputError(f"the prompt needs {len(windows)} windows, at most {MAX_WINDOWS} are read", where="prompt",
                             fix="shorten it")
        rows = []
        for ids, weights in windows:
            row = self._encoded(ids)
            if (weights != 1).any():
                empty = self._empty()
                row = empty + weights[:, None] * (row - empty)
            rows.append(row)
        return np.concatenate(rows)

    def _padded(self, row: Float32, tokens: int) -> Float32:
        if len(row) == tokens:
            return row
        empty = self._empty()
        return np.concatenate([row, *[empty] * ((tokens - len(row)) // len(empty))])

    def _empty(self) -> Float32:
        return self._encoded(self._tokenizer([""])[0])

    def _encoded(self, ids: NDArray[np.int64]) -> Float32:
        """One window: (tokens, width) float32."""
        return self._output(ids, self._encoder.component.outputs[0].name)

    def pooled(self, texts: Sequence[str]) -> Float32:
        """The pooled embedding of each text's first tokens, its weights ignored: (B, width) float32."""
        distinct = list(dict.fromkeys(texts))
        found = {text: self._output(ids, "text_embeds")
                 for text, ids in zip(distinct, self._tokenizer(distinct), strict=True)}
        return np.stack([found[text] for text in texts])

    def _output(self, ids: NDArray[np.int64], name: str) -> Float32:
        """One row of one output, from the cache or the text encoder."""
        key = f"{self._encoder.name}/{name}/".encode() + ids.tobytes()
        row = self._cache.get(key)
        if row is None:
            row = run_rows(self._encoder, {"input_ids": ids[None]}, name)[0].astype(np.float32)
            self._cache.put(key, row)
        return row
