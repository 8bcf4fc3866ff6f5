"""From choices to a case; the same as a Hypothesis strategy, for shrinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import adapters, folders, requests
from tests.fuzz.case import Case
from tests.fuzz.choices import Choices

# What neither side takes, or diffusers cannot run here.
INVALID = ("size", "strength", "shard missing", "truncated", "two variants", "class for other channels",
           "word twice", "word of the vocabulary", "half a LoRA", "alpha of another form",
           "no scheduler class", "prompt", "mode of other networks", "scipy", "image mode", "U-Net without a version",
           "tokenizer longer than its encoder")
# What ours refuses by rule and diffusers runs. They share one card: with one each, more than 5 % of the cases that
# diffusers runs would be refused.
BY_RULE = ("pickle", "attention mask", "eta", "unknown key", "stale files", "latents_mean of Stable Diffusion", "dora",
           "leftover", "duplicate", "lost tensor", "sample_size")
RULES = "refused by rule"


def make(choices: Choices) -> Case:
    """One case: a model folder, adapters for it, and a request."""
    choices.invalid = choices.pick("invalid", ("", *INVALID, RULES, RULES), often=72)
    if choices.invalid == RULES:
        choices.invalid = choices.pick("invalid by rule", BY_RULE, counted=False)
    model = folders.choose(choices)
    loras = adapters.choose_loras(choices, model)
    embeddings = adapters.choose_embeddings(choices, model)
    return Case(choices.number, model, loras, embeddings, requests.choose(choices, model, embeddings))


@st.composite
def cases(draw: Callable[..., Any], number: int) -> Case:
    """Cases near the one of a number, which most examples are; they shrink towards the plainest of all."""
    return make(Choices(number, draw))
