"""Reads published CLIP tokenizer folders of old and new layouts: vocabulary, merges, markers, added tokens.

The order of precedence is that of transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.errors import InputError

if TYPE_CHECKING:
    from tokenizers import AddedToken

MARKERS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Names of further special tokens, old and new.
FURTHER = ("extra_special_tokens", "additional_special_tokens")


def special_tokens(
    source: Path, config: Mapping[str, Any], whole: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[AddedToken], dict[str, int]]:
    """Names of the markers, the added tokens in the order of their ids, and the ids that the files state.

    The precedence is that of transformers' `PreTrainedTokenizerBase._from_pretrained`.

    Args:
        source: the folder.
        config: its tokenizer_config.json.
        whole: its tokenizer.json.

    Raises:
        InputError: malformed tokens.
    """
    try:
        return _special_tokens(source, config, whole)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"malformed special tokens: {error!r}", where=str(source),
                         fix="save the tokenizer again with transformers") from error


def _special_tokens(
    source: Path, config: Mapping[str, Any], whole: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[AddedToken], dict[str, int]]:
    values: dict[str, Any] = {**MARKERS, **{k: config[k] for k in _NAMED if config.get(k)}}
    further: list[Any] = next((config[k] for k in FURTHER if config.get(k)), [])
    stated: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        stated = {int(i): _token(t) for i, t in config["added_tokens_decoder"].items()}
    else:
        special = read_object(source / "special_tokens_map.json") or {}
        values |= {k: special[k] for k in _NAMED if special.get(k)}
        further = next((special[k] for k in FURTHER if special.get(k)), further)
        contents = {content_of(v) for v in (*values.values(), *further)}
        for text, i in (read_object(source / "added_tokens.json") or {}).items():
            stated[i] = _token({"content": text, "normalized": text not in contents, "special": text in contents})
        for token in whole.get("added_tokens", []) if whole else []:
            stated[token["id"]] = _token({k: v for k, v in token.items() if k != "id"})
    names = {k: content_of(v) for k, v in values.items()}
    added = [token for _, token in sorted(stated.items())]
    known = {token.content for token in added}
    added += [t for t in tokens_of(values) if t.content not in known]
    known |= {token.content for token in added}
    added += [t for t in (_token(value) for value in further) if t.content not in known]
    return names, added, {token.content: i for i, token in stated.items()}


def tokens_of(values: Mapping[str, Any]) -> list[AddedToken]:
    """The distinct special tokens in transformers' order of names.

    Equal contents with other flags stay: `tokenizers` lets the last of them count, as it does for transformers.
    """
    tokens: list[AddedToken] = []
    for name in _NAMED:
        if name in values and (token := _token(values[name])) not in tokens:
            tokens.append(token)
    return tokens


def _token(value: Any) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in value}
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)


def content_of(value: Any) -> str:
    """The text of a token that is written as a string or as an object."""
    return value if isinstance(value, str) else str(value["content"])


def from_bpe_files(vocab_file: Path | str, merges_file: Path | str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of vocab.json and merges.txt.

    Raises:
        InputError: a file is missing or malformed.
    """
    from tokenizers.models import BPE

    try:
        vocab, merges = BPE.read_file(str(vocab_file), str(merges_file))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise InputError(f"cannot read the vocabulary: {first_line(error)}", where=f"{vocab_file}, {merges_file}",
                         fix="download the tokenizer again") from error
    return vocab, merges


def from_tokenizer_json(whole: Mapping[str, Any], file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer.json, already parsed.

    Raises:
        InputError: another kind of tokenizer, or a malformed one.
    """
    try:
        model = whole["model"]
        if model.get("type", "BPE") != "BPE":
            raise InputError(f"a {model['type']} tokenizer, expected CLIP's byte-pair encoding", where=str(file))
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return dict(model["vocab"]), [(first, second) for first, second in pairs]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"malformed tokenizer: {error!r}", where=str(file), fix="download the model again") from error


def read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file.

    Raises:
        InputError: anything else there.
    """
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise InputError("expected a JSON object", where=str(file))
    return value


def first_line(error: Exception) -> str:
    """What `tokenizers` says, whose errors have several lines."""
    return str(error).partition("\n")[0]
