"""From choices to a case; the same as a Hypothesis strategy, for shrinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import adapters, folders, requests
from tests.fuzz.case import Case
from tests.fuzz.choices import Choices


# What a case may have that is refused, or that diffusers cannot run.
INVALID = ("size", "strength", "weight files", "pickle", "class for other channels", "attention mask", "sample_size",
           "word twice", "word of the vocabulary", "LoRA", "eta", "no scheduler class", "prompt",
           "mode of other networks", "scipy", "image mode", "unknown key",
           "latents_mean of Stable Diffusion", "U-Net without a version", "tokenizer longer than its encoder",
           "stale files")


def make(choices: Choices) -> Case:
    """One case: a model folder, adapters for it, and a request."""
    choices.invalid = choices.pick("invalid", ("", *INVALID), often=5 * len(INVALID))
    model = folders.choose(choices)
    loras = adapters.choose_loras(choices, model)
    embeddings = adapters.choose_embeddings(choices, model)
    return Case(choices.number, model, loras, embeddings, requests.choose(choices, model, embeddings))


@st.composite
def cases(draw: Callable[..., Any], number: int) -> Case:
    """Cases near the one of a number, which most examples are; they shrink towards the plainest of all."""
    return make(Choices(number, draw))
