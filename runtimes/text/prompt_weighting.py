"""Parses prompt weighting, `(word:1.3)`, `(word)` and `[word]`, to fragments of text with weights.

`clip_tokenizer` gives the weights to tokens, `prompt_encoder` applies them to embeddings.

The syntax is that of AUTOMATIC1111's web UI: round brackets multiply by 1.1 or by the number given, square brackets
divide by 1.1, brackets nest, and a backslash makes a bracket text. A bracket without its partner is text too.
"""

from __future__ import annotations

import re

from runtimes.errors import InputError

ROUND = 1.1
MAX_WEIGHT = 10.0
_PIECES = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\")
_NUMBER = re.compile(r":\s*(\d+\.?\d*|\.\d+)\s*$")
Fragment = tuple[str, float]


def parse(prompt: str) -> list[Fragment]:
    """Fragments of text, each with its weight, in order.

    >>> parse("a (red:1.5) apple")
    [('a ', 1.0), ('red', 1.5), (' apple', 1.0)]
    >>> parse(r"a [blurry] \\(photo\\)")
    [('a ', 1.0), ('blurry', 0.9090909090909091), (' (photo)', 1.0)]

    Raises:
        InputError: a weight above 10.
    """
    open_brackets: list[tuple[str, list[Fragment]]] = [("", [])]
    for piece in _PIECES.findall(prompt):
        if piece in ("(", "["):
            open_brackets.append((piece, []))
        elif piece in (")", "]") and open_brackets[-1][0] == {")": "(", "]": "["}[piece]:
            _, inside = open_brackets.pop()
            open_brackets[-1][1].extend(_weighted(piece, inside))
        else:
            text = piece[1] if len(piece) == 2 and piece[0] == "\\" else piece
            open_brackets[-1][1].append((text, 1.0))
    fragments = [f for bracket, inside in open_brackets for f in ((bracket, 1.0), *inside)]
    return _joined(fragments)


def _weighted(closing: str, inside: list[Fragment]) -> list[Fragment]:
    """The fragments of a closed bracket with its weight on top of theirs."""
    weight = 1 / ROUND if closing == "]" else ROUND
    if closing == ")" and inside and (found := _NUMBER.search(inside[-1][0])):
        weight = float(found[1])
        inside = [*inside[:-1], (inside[-1][0][: found.start()], inside[-1][1])]
    if weight > MAX_WEIGHT:
        raise InputError(f"the weight {weight} is above {MAX_WEIGHT}", where="prompt", fix="weights are about 0.5 to 2")
    return [(text, own * weight) for text, own in inside]


def _joined(fragments: list[Fragment]) -> list[Fragment]:
    """Neighbours of equal weight as one, empty ones left out: an unweighted prompt stays one piece of text."""
    result: list[Fragment] = []
    for text, weight in fragments:
        if text and result and result[-1][1] == weight:
            result[-1] = result[-1][0] + text, weight
        elif text:
            result.append((text, weight))
    return result
