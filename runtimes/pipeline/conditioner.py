"""Makes the denoiser's inputs besides sample and timestep: embedded prompts, pooled embeddings, sizes as numbers.

The prompt is read by one or two text encoders; sizes are those of Stable Diffusion XL, arXiv 2307.01952, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.session import Session
from runtimes.bundle.roles import Roles
from runtimes.inputs.request_fields import SizeConditions
from runtimes.inputs.resolved_request import Resolved
from runtimes.text.prompt_cache import PromptCache
from runtimes.text.prompt_encoder import Embedder, PromptStyle, Tokenize

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Conditions:
    """One entry for each of the B images.

    Attributes:
        cond: embedded prompts, (tokens, width) float32 each; (0, 0) for a pipeline without prompts.
        uncond: the same for the negative prompts, or None without guidance.
        added, added_uncond: further inputs of the denoiser by name, (B, n) float32 each.
    """

    cond: list[Float32]
    uncond: list[Float32] | None
    added: Mapping[str, Float32] = field(default_factory=dict)
    added_uncond: Mapping[str, Float32] = field(default_factory=dict)

    def repeated(self, count: int) -> Conditions:
        """The same for `count` * B rows, all of the images before the first again."""
        added, added_uncond = ({name: np.concatenate([values] * count) for name, values in part.items()}
                               for part in (self.added, self.added_uncond))
        return Conditions(self.cond * count, self.uncond and self.uncond * count, added, added_uncond)


class Conditioner:
    """The text encoders of a pipeline, and how what they give becomes the denoiser's inputs. Threads may share one."""

    def __init__(self, roles: Roles, tokenizers: Sequence[Tokenize], cache: PromptCache) -> None:
        """Remember the parts.

        Args:
            roles: of the pipeline; its conditioner says what is made of which output.
            tokenizers: one for each text encoder.
            cache: of embedded prompts, shared between calls.
        """
        self._role, self._tokenizers, self._cache = roles.conditioner, tokenizers, cache

    def gather(self, sessions: Mapping[str, Session], style: PromptStyle, wanted: Resolved, sizes: SizeConditions,
               ) -> Conditions:
        """Encode the prompts of a request and collect what else the denoiser takes.

        Args:
            sessions: the networks as this request may run them.
            style: how prompts are read.
            wanted: the request.
            sizes: what the denoiser takes about sizes.
        """
        images, guided, role = len(wanted.prompts), bool(wanted.negatives), self._role
        if not role.encoders:
            return Conditions([np.empty((0, 0), np.float32)] * images, None)
        embedders = self._embedders(sessions, style)
        readers = [(e, r) for e, r in zip(embedders, role.encoders, strict=True) if r.hidden]
        pairs = [(embedder.pair(wanted.prompts, wanted.negatives), reader.join) for embedder, reader in readers]
        cond = _joined([(pair[0], join) for pair, join in pairs])
        uncond = _joined([(pair[1], join) for pair, join in pairs if pair[1] is not None]) if guided else None
        added: dict[str, Float32] = {}
        added_uncond: dict[str, Float32] = {}
        if role.pooled:
            pooling = [embedder for embedder, r in zip(embedders, role.encoders, strict=True) if r.pooled]
            added[role.pooled] = np.concatenate([e.pooled(wanted.prompts) for e in pooling], axis=-1)
            if guided:
                added_uncond[role.pooled] = np.concatenate([e.pooled(wanted.negatives) for e in pooling], axis=-1)
        for name, meanings in role.numbers.items():
            rows = [sizes.numbers(meanings, wanted.height, wanted.width, negative=n) for n in (False, True)]
            added[name], added_uncond[name] = (np.repeat(row[None], images, axis=0) for row in rows)
        if role.empty_negative == "zeros" and uncond is not None and not wanted.negatives_given:
            uncond = [np.zeros_like(row) for row in uncond]
            if role.pooled:
                added_uncond[role.pooled] = np.zeros_like(added_uncond[role.pooled])
        return Conditions(cond, uncond, added, added_uncond)

    def encode_together(self, component: str, sessions: Mapping[str, Session],
                        wanted: Sequence[tuple[PromptStyle, Resolved]]) -> None:
        """Encode the new prompts of several requests in as few calls of one text encoder as it takes.

        They are in the cache then, for `gather`. For an encoder whose rows do not depend on their company: otherwise an
        image would depend on who was asked for at the same time.

        Args:
            component: the text encoder.
            sessions: the networks.
            wanted: style and prompts of each request.
        """
        index = [reader.component for reader in self._role.encoders].index(component)
        texts: dict[PromptStyle, list[str]] = {}
        for style, one in wanted:
            texts.setdefault(style, []).extend([*one.prompts, *one.negatives])
        for style, of_style in texts.items():
            self._embedders(sessions, style)[index].encode_together(of_style)

    def _embedders(self, sessions: Mapping[str, Session], style: PromptStyle) -> list[Embedder]:
        return [Embedder(tokenize, sessions[reader.component], self._cache, style, reader)
                for tokenize, reader in zip(self._tokenizers, self._role.encoders, strict=True)]


def _joined(parts: Sequence[tuple[list[Float32], str]]) -> list[Float32]:
    """Hidden states of the encoders as one context for each image: (tokens, width) float32.

    Args:
        parts: of each encoder the hidden states of every image, and how they join those before: on "features" or, the
            narrower ones padded with zeros, on "tokens".
    """
    whole = parts[0][0]
    for rows, join in parts[1:]:
        if join == "features":
            whole = [np.concatenate(pair, axis=-1) for pair in zip(whole, rows, strict=True)]
        else:
            width = max(whole[0].shape[1], rows[0].shape[1])
            whole = [np.concatenate([_widened(part, width) for part in pair]) for pair in zip(whole, rows, strict=True)]
    return whole


def _widened(rows: Float32, width: int) -> Float32:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
