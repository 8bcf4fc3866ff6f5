"""Faults of diffusers that ours does not copy: by name, with the upstream line, and what diffusers does once mended.

A fault is only recognized where diffusers with the mend in place does what ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.fuzz.case import Case


@dataclass(frozen=True)
class KnownFault:
    """A deviation on purpose.

    Attributes:
        name: in the report.
        upstream: file and line of diffusers 0.42.1.
        why: what upstream does and what ours does instead.
        concerns: whether a case may meet it.
        mend: makes a loaded pipeline do the right thing; given the pipeline and its generators.
    """

    name: str
    upstream: str
    why: str
    concerns: Callable[[Case], bool]
    mend: Callable[[Any, list[Any]], None]


def _expand_whole_words(pipe: Any, generators: list[Any]) -> None:
    """Words of several vectors: each added token that the tokenizer finds, and no other text, is spelled out."""
    import re

    def convert(prompt: str, tokenizer: Any) -> str:
        added = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        whole = re.compile("|".join(map(re.escape, added)), re.IGNORECASE)
        lowered = {token.lower(): token for token in added}

        def spelled(match: re.Match[str]) -> str:
            token = lowered[match[0].lower()]
            further = []
            while f"{token}_{len(further) + 1}" in tokenizer.added_tokens_encoder:
                further.append(f"{token}_{len(further) + 1}")
            return " ".join([match[0], *further])

        return whole.sub(spelled, prompt)

    pipe._maybe_convert_prompt = convert


def _pass_generators(pipe: Any, generators: list[Any]) -> None:
    from inspect import signature

    step = pipe.scheduler.step
    if "generator" in signature(step).parameters:
        # `partial` keeps the signature, by which pipelines decide what they pass on.
        pipe.scheduler.step = partial(step, generator=generators if len(generators) > 1 else generators[0])


def _has_words(case: Case) -> bool:
    return bool(case.model.words or case.embeddings)


KNOWN: tuple[KnownFault, ...] = (
    KnownFault(
        "a word of several vectors is spelled out inside longer words and only in the tokenizer's spelling",
        "loaders/textual_inversion.py:187 (_maybe_convert_prompt: `prompt.replace(token, replacement)`)",
        "`<cat>` of two vectors also becomes `<cat> <cat>_1` inside `<cat>-toy` and `<cat>_1`; a word with capitals is "
        "looked up in lower case and keeps its first vector alone. Ours spells out whole tokens, all vectors "
        "(stable-diffusion-webui#1054).",
        _has_words, _expand_whole_words),
    KnownFault(
        "LDM pipelines give their scheduler no generator",
        "pipelines/latent_diffusion/pipeline_latent_diffusion.py:205 and "
        "deprecated/latent_diffusion_uncond/pipeline_latent_diffusion_uncond.py:122 (scheduler.step without generator)",
        "fresh noise of ancestral and stochastic samplers comes from the global state, so a seed means nothing; ours "
        "draws it from the seed.",
        lambda case: case.model.kind.startswith("ldm"), _pass_generators),
)
