"""Words that the field does not use, in names, comments, docstrings and messages of the packages."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.structure.arrows import ROOT, modules

# "kept" may be said of files, so it is looked for in names alone; keys of published JSON stay as they are.
KEYS = {"kept", "kept_float32", "kept_nodes"}
IN_TEXT = re.compile(r"\b(?:pictures?|drawings?|drawn|drew|told|begun|borne)\b", re.IGNORECASE)
IN_NAMES = re.compile(rf"(?:^|_){IN_TEXT.pattern[2:-2]}(?:_|$)|(?:^|_)kept(?:_|$)", re.IGNORECASE)
# From Python 3.12 on, the text inside an f-string is a token of its own.
_STRINGS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def banned_words(root: Path = ROOT) -> list[str]:
    """`module:line word` of each. A string without a blank is a key of published JSON, which stays as it is."""
    return [f"{module}:{line} {word}" for module, file in modules(root).items()
            for line, word in _in_file(file.read_text(encoding="utf-8"))]


def _in_file(code: str) -> Iterator[tuple[int, str]]:
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    for before, token, after in zip([tokens[0], *tokens], tokens, [*tokens[1:], tokens[-1]], strict=False):
        if token.string in KEYS and (before.string == "." or (after.start == token.end and after.string in "=:")):
            continue  # an attribute, a keyword or a field
        if token.type == tokenize.NAME:
            found = IN_NAMES.search(_CAPITAL.sub("_", token.string))
        elif token.type == tokenize.COMMENT or (token.type in _STRINGS and re.search(r"\s", token.string)):
            found = IN_TEXT.search(token.string)
        else:
            continue
        if found is not None:
            yield token.start[0], token.string if token.type == tokenize.NAME else found[0]
