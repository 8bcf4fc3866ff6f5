"""Embeds prompts: tokenizes them, looks them up, runs the text encoder for what is new, and applies prompt weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import RowRunner, run_rows
from runtimes.backends.session import Session
from runtimes.bundle.roles import PROMPT, TextEncoder
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

    def __init__(
        self, tokenizer: Tokenize, encoder: Session, cache: PromptCache, style: PromptStyle, role: TextEncoder
    ) -> None:
        """Remember the parts.

        Args:
            tokenizer: (B,) strings -> (B, tokens) int64; a `ClipTokenizer` where the style is not the default.
            encoder: token numbers -> hidden states, or a pooled embedding, or both.
            cache: shared between calls.
            style: how prompts are read.
            role: names the encoder's input and outputs, and what a prompt is put into before it is read.
        """
        self._tokenizer, self._encoder, self._cache, self._style = tokenizer, encoder, cache, style
        self._role = role

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
            rows = [self._encoded(ids) for ids in self._tokenized(distinct)]
        else:
            rows = [self._read(text) for text in distinct]
        found = dict(zip(distinct, rows, strict=True))
        return [found[text] for text in texts]

    def encode_together(self, texts: Sequence[str]) -> None:
        """Encode whatever of texts is not in the cache, as many windows in a call as the encoder takes."""
        distinct = list(dict.fromkeys([*texts, ""]))
        windows = list(self._tokenized(distinct))
        if self._style != PromptStyle():
            windows += [ids for text in distinct for ids, _ in self._windows(text)]
        outputs = [name for name in (self._role.hidden, self._role.pooled) if name]
        fresh = [ids for ids in {ids.tobytes(): ids for ids in windows}.values()
                 if any(self._key(ids, name) not in self._cache for name in outputs)]
        if len(fresh) < 2:
            return
        found = RowRunner(self._encoder, len(fresh)).run({self._role.ids: np.stack(fresh)})
        for name in outputs:
            for ids, row in zip(fresh, found[name], strict=True):
                self._cache.put(self._key(ids, name), row.astype(np.float32))

    def _tokenized(self, texts: Sequence[str]) -> NDArray[np.int64]:
        template = self._role.template
        return self._tokenizer([template.replace(PROMPT, text) for text in texts] if template else texts)

    def _windows(self, text: str) -> list[tuple[NDArray[np.int64], Float32]]:
        """The windows of a prompt: its numbers (tokens,) int64, and their weights (tokens,) float32."""
        if not isinstance(self._tokenizer, ClipTokenizer):
            raise InputError("this pipeline's tokenizer reads plain prompts only", where="prompt",
                             fix="leave prompt weighting and long prompts off")
        text = self._role.template.replace(PROMPT, text) if self._role.template else text
        windows = self._tokenizer.windows(prompt_weighting.parse(text) if self._style.weighting else [(text, 1.0)])
        if len(windows) > 1 and not self._style.long_prompts:
            logger.warning("the prompt needs %d windows of %d tokens; all but the first are cut",
                           len(windows), self._tokenizer.tokens)
            windows = windows[:1]
        if len(windows) > MAX_WINDOWS:
            raise InputError(f"the prompt needs {len(windows)} windows, at most {MAX_WINDOWS} are read", where="prompt",
                             fix="shorten it")
        return windows

    def _read(self, text: str) -> Float32:
        """One prompt in windows, its words weighted: (tokens * windows, width) float32.

        A weight moves a token's embedding along the line from the empty prompt's at the same place, as ComfyUI does:
        weight 1 changes nothing, weight 0 takes the word's influence away, and no mean has to be restored.
        """
        rows = []
        for ids, weights in self._windows(text):
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
        return self._encoded(self._tokenized([""])[0])

    def _encoded(self, ids: NDArray[np.int64]) -> Float32:
        """One window: (tokens, width) float32."""
        return self._output(ids, self._role.hidden)

    def pooled(self, texts: Sequence[str]) -> Float32:
        """The pooled embedding of each text's first tokens, its weights ignored: (B, width) float32."""
        distinct = list(dict.fromkeys(texts))
        found = {text: self._output(ids, self._role.pooled)
                 for text, ids in zip(distinct, self._tokenized(distinct), strict=True)}
        return np.stack([found[text] for text in texts])

    def _output(self, ids: NDArray[np.int64], name: str) -> Float32:
        """One row of one output, from the cache or the text encoder."""
        key = self._key(ids, name)
        row = self._cache.get(key)
        if row is None:
            row = run_rows(self._encoder, {self._role.ids: ids[None]}, name)[0].astype(np.float32)
            self._cache.put(key, row)
        return row

    def _key(self, ids: NDArray[np.int64], output: str) -> bytes:
        return f"{self._encoder.name}/{output}/".encode() + ids.tobytes()
