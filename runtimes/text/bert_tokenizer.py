"""Converts BERT's tokenizer, which LDMBert reads prompts with, to the one form that `ClipTokenizer` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.errors import InputError
from runtimes.text.tokenizer_files import FURTHER, content_of, read_object

TOKENIZER_FILE, CONFIG_FILE, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "vocab.txt"
BERT = "BertTokenizer"
_START, _END, _PAD, _UNKNOWN, _MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"


def is_bert(source: Path, config: dict[str, Any]) -> bool:
    """Whether a tokenizer folder is BERT's."""
    return str(config.get("tokenizer_class", "")).startswith("Bert") or (source / VOCABULARY).is_file()


def prepare_bert_tokenizer(source: Path, out: Path, config: dict[str, Any]) -> int | None:
    """Write tokenizer.json and a small tokenizer_config.json equal to transformers' BertTokenizer.

    Args:
        source: holds vocab.txt or tokenizer.json.
        out: receives the files.
        config: the source's tokenizer_config.json.

    Returns:
        the longest prompt in tokens that the source states, or None.

    Raises:
        InputError: no vocabulary there, or one without the markers; other markers or added tokens, which no LDMBert
            is known to have.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    vocabulary = _vocabulary(source)
    _refuse_own_words(source, config)
    for token in (_START, _END, _PAD, _UNKNOWN):
        if token not in vocabulary:
            raise InputError(f"{token} is not in the vocabulary", where=str(source), fix="download the tokenizer again")
    tokenizer = Tokenizer(WordPiece(vocab=vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"), lowercase=bool(config.get("do_lower_case", True)))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([t for t in (_UNKNOWN, _END, _PAD, _START, _MASK) if t in vocabulary])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(t, vocabulary[t]) for t in (_START, _END)])
    length = config.get("model_max_length")
    length = int(length) if isinstance(length, int | float) and 2 < length < 1_000_000 else None
    small = {"pad_token": _PAD, "model_max_length": length, "tokenizer_class": BERT}
    out.mkdir(parents=True, exist_ok=True)
    (out / TOKENIZER_FILE).write_text(str(tokenizer.to_str(pretty=True)), encoding="utf-8")
    (out / CONFIG_FILE).write_text(json.dumps(small, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return length


def _refuse_own_words(source: Path, config: dict[str, Any]) -> None:
    markers = {"cls_token": _START, "sep_token": _END, "pad_token": _PAD, "unk_token": _UNKNOWN, "mask_token": _MASK}
    try:
        special, added, whole = (read_object(source / name) or {} for name in
                                 ("special_tokens_map.json", "added_tokens.json", TOKENIZER_FILE))
        for key, marker in markers.items():
            for found in (config.get(key), special.get(key)):
                if found and content_of(found) != marker:
                    raise InputError(f"{key} is {content_of(found)!r}, expected {marker}", where=str(source),
                                     fix="save the tokenizer with BERT's own markers")
        stated = [*(config.get("added_tokens_decoder") or {}).values(), *added, *(whole.get("added_tokens") or []),
                  *(token for place in (config, special) for key in FURTHER for token in place.get(key) or [])]
        words = sorted({content_of(token) for token in stated} - set(markers.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"malformed special tokens: {error!r}", where=str(source),
                         fix="save the tokenizer again with transformers") from error
    if words:
        raise InputError(f"{words[0]} is an added token, which the runtime does not read for BERT", where=str(source),
                         fix="save the tokenizer without it")


def _vocabulary(source: Path) -> dict[str, int]:
    try:
        if (source / VOCABULARY).is_file():
            lines = (source / VOCABULARY).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return {token: i for i, token in enumerate(lines)}
        whole = json.loads((source / TOKENIZER_FILE).read_text(encoding="utf-8"))
        return {str(token): int(i) for token, i in whole["model"]["vocab"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"no readable vocabulary: {error}".splitlines()[0], where=str(source),
                         fix="download the model again") from error
