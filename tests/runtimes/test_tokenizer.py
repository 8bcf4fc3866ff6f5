"""Our tokenization equals transformers' on odd strings, whatever layout the source folder has."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from runtimes.errors import BundleError, InputError
from runtimes.text.clip_tokenizer import ClipTokenizer, prepare_tokenizer, tokenizer_json_from_bpe
from tests.runtimes.vocabulary import WORDS, Vocabulary, make_vocabulary

PIECES = [
    "", " ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\x00", "\x07", "\x1f", "\x7f", "\u200b", "\u200d",
    "\ufeff", "\u2028", "\ufffd", "é", "e\u0301", "ﬁ", "Å", "Ω", "ß", "İ", "ı", "Ǆ", "漢字", "日本語テスト", "한국어",
    "العربية", "עברית", "हिन्दी", "ไทย", "🍎", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "☃", "①", "½", "٣", "𝔘𝔫𝔦", "𐍈",
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext", "|>", "</w>", "##", "'s", "'LL", "'d", "'",
    "!", "!!", "!?", "...", "(red:1.3)", "[x]", "{}", "\\", "\"", "#", "@", "$9.99", "50%", "a_b", "a-b", "x" * 40,
    "RED", "Apple", "ﾊﾝｶｸ", "\U0010ffff", "\ue000", "ͦ", "a\u0308\u0323", "\u1e9b\u0323",
]


def odd_strings(count: int) -> list[str]:
    rng = random.Random(7)
    texts = [*PIECES, " ".join(WORDS), " ".join(WORDS * 3), "🍎" * 50, "<|endoftext|>" * 30, "a" * 4000]
    while len(texts) < count:
        parts = rng.choices(PIECES + WORDS, k=rng.randint(1, 12))
        if rng.random() < 0.3:
            parts.append("".join(chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x1F300, 0x1FAFF)]))
                                 for _ in range(rng.randint(1, 8))))
        texts.append(rng.choice(["", " ", "  ", "\n"]).join(parts))
    return texts


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return make_vocabulary()


def write_old(folder: Path, vocabulary: Vocabulary, config: Mapping[str, object],
              special: Mapping[str, object]) -> Path:
    folder.mkdir()
    vocab, merges = vocabulary
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


def flags(content: str, normalized: bool) -> dict[str, object]:
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def make_folder(layout: str, length: int, path: Path, vocabulary: Vocabulary) -> Path:
    start, end = "<|startoftext|>", "<|endoftext|>"
    typed = {"__type": "AddedToken", **flags(end, True)}
    if layout == "transformers 5":
        folder = path / "new"
        CLIPTokenizer(vocab=vocabulary[0], merges=vocabulary[1], model_max_length=length).save_pretrained(folder)
        return folder
    if layout == "transformers 5, padded with !":
        folder = path / "new"
        CLIPTokenizer(vocab=vocabulary[0], merges=vocabulary[1], model_max_length=length,
                      pad_token="!").save_pretrained(folder)
        return folder
    if layout == "stable diffusion 1.5":
        config = {"model_max_length": length, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
                  "bos_token": {"__type": "AddedToken", **flags(start, True)}, "eos_token": typed,
                  "unk_token": typed, "pad_token": end, "add_prefix_space": False, "errors": "replace"}
        special = {"bos_token": flags(start, True), "eos_token": flags(end, True), "pad_token": end,
                   "unk_token": flags(end, True)}
        return write_old(path / "old", vocabulary, config, special)
    if layout == "stable diffusion 2":
        config = {"model_max_length": length, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
        special = {"bos_token": flags(start, True), "eos_token": flags(end, True), "pad_token": "!",
                   "unk_token": flags(end, True)}
        return write_old(path / "old", vocabulary, config, special)
    vocab = vocabulary[0]
    config = {"model_max_length": length, "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!",
              "added_tokens_decoder": {
                  str(vocab["!"]): {**flags("!", False), "special": True},
                  str(vocab[start]): {**flags(start, True), "special": True},
                  str(vocab[end]): {**flags(end, False), "special": True},
                  str(len(vocab)): {**flags("<cat-toy>", False), "special": False}}}
    return write_old(path / "old", vocabulary, config, {})


LAYOUTS = ["transformers 5", "transformers 5, padded with !", "stable diffusion 1.5", "stable diffusion 2",
           "added_tokens_decoder"]


@pytest.mark.parametrize("length", [77, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_equal_transformers_on_1000_odd_strings(layout, length, tmp_path, vocabulary, caplog):
    folder = make_folder(layout, length, tmp_path, vocabulary)
    assert prepare_tokenizer(folder, tmp_path / "bundle") == length
    ours = ClipTokenizer.load(tmp_path / "bundle", length)
    texts = [*odd_strings(1000), "a <cat-toy> on a tree", "<cat-toy>!"]
    theirs = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="np").input_ids
    caplog.set_level(logging.ERROR)
    mine = ours(texts)
    assert mine.dtype == np.int64 and mine.shape == (len(texts), length)
    different = [text for text, a, b in zip(texts, mine, theirs, strict=True) if not np.array_equal(a, b)]
    assert different == []


def test_bpe_files_alone_give_clips_tokenizer(tmp_path, vocabulary):
    folder = write_old(tmp_path / "old", vocabulary, {}, {})
    mine = Tokenizer.from_str(tokenizer_json_from_bpe(folder / "vocab.json", folder / "merges.txt"))
    theirs = CLIPTokenizer(vocab=vocabulary[0], merges=vocabulary[1])
    for text in odd_strings(200):
        assert mine.encode(text).ids == theirs(text).input_ids


def test_preparing_twice_gives_the_same_bytes(tmp_path, vocabulary):
    folder = make_folder("stable diffusion 1.5", 77, tmp_path, vocabulary)
    prepare_tokenizer(folder, tmp_path / "a")
    prepare_tokenizer(folder, tmp_path / "b")
    prepare_tokenizer(tmp_path / "a", tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    mine, again = (ClipTokenizer.load(tmp_path / x, 77)(odd_strings(300)) for x in "ac")
    np.testing.assert_array_equal(mine, again)


@pytest.fixture
def tokenizer(tmp_path, vocabulary) -> ClipTokenizer:
    prepare_tokenizer(make_folder("stable diffusion 1.5", 16, tmp_path, vocabulary), tmp_path / "bundle")
    return ClipTokenizer.load(tmp_path / "bundle", 16)


def test_a_cut_prompt_is_logged_with_what_was_cut(tokenizer, caplog):
    tokenizer([" ".join(["apple"] * 14)])
    assert not caplog.records
    tokenizer([" ".join(["apple"] * 14) + " RED  house"])
    assert "'RED  house'" in caplog.text and "16 tokens" in caplog.text


@pytest.mark.parametrize(("text", "message"), [
    ("a" * 100_001, "100,001 characters"), ("\ud800", "not valid Unicode"), (None, "NoneType"), (b"a", "bytes"),
])
def test_a_prompt_no_tokenizer_takes_is_one_clear_line(tokenizer, text, message):
    with pytest.raises(InputError, match=message):
        tokenizer([text])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        prepare_tokenizer(tmp_path, tmp_path / "out")
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        ClipTokenizer.load(tmp_path, 77)


def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path, vocabulary):
    folder = write_old(tmp_path / "old", vocabulary, {}, {})
    (folder / "merges.txt").write_text("#version: 0.2\nzz qq\n", encoding="utf-8")
    with pytest.raises(InputError, match="do not fit"):
        prepare_tokenizer(folder, tmp_path / "out")


def test_a_missing_marker_is_refused(tmp_path, vocabulary):
    folder = write_old(tmp_path / "old", vocabulary, {}, {"added": "x"})
    (folder / "vocab.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read the vocabulary"):
        prepare_tokenizer(folder, tmp_path / "out")
    with pytest.raises(InputError, match="cannot read the vocabulary"):
        tokenizer_json_from_bpe(folder / "vocab.json", folder / "merges.txt")
