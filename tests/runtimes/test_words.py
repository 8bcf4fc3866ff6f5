"""Words of several vectors and any prompt at all: our ids equal those that diffusers feeds the text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import BertTokenizer, CLIPTokenizer

from runtimes.errors import InputError
from runtimes.text.clip_tokenizer import ClipTokenizer, check_rows, prepare_tokenizer
from tests.runtimes.test_tokenizer import PIECES, flags, write_old
from tests.runtimes.vocabulary import WORDS, make_vocabulary

LENGTH = 24
# several vectors, one of them, a name within another's, odd characters, spaces, letters that CLIP splits off
ADDED = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "bad_prompt", "bad_prompt_1", "bad_prompt_version2",
         "bad_prompt_version2_1", "cat", "<one>", "fünf", "fünf_1", "two words", "two words_1", "#", "#_1", "🍎",
         "🍎_1", "x_2", *(f"many_{i}" for i in range(1, 12)), "many"]


def read_by_diffusers(tokenizer: Any, text: str, length: int = LENGTH) -> list[int]:
    """What `StableDiffusionPipeline.encode_prompt` does with a prompt."""
    text = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
    ids: list[int] = tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
    return ids


def clip(folder: Path, added: list[Any], **options: Any) -> Path:
    vocab, merges = make_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, **options)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return folder


def both(folder: Path, length: int = LENGTH) -> tuple[ClipTokenizer, Any]:
    """Ours and theirs from one published folder."""
    prepare_tokenizer(folder, folder / "ours")
    return ClipTokenizer.load(folder / "ours", length), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def with_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipTokenizer, Any]:
    return both(clip(tmp_path_factory.mktemp("words") / "tokenizer", ADDED))


TEXTS = st.lists(st.sampled_from([*PIECES, *WORDS, *ADDED, ",", ".", " ", "doghouse", "catalogue"])
                 | st.text(max_size=6)).map("".join) | st.lists(st.sampled_from([*WORDS, *ADDED])).map(" ".join)
QUICK = settings(max_examples=400, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def several(tokenizer: Any) -> list[str]:
    encoder = tokenizer.added_tokens_encoder
    return [token for token in encoder if f"{token}_1" in encoder]


def is_clear(text: str, tokenizer: Any) -> bool:
    """Whether diffusers' replacement of text does what it is for.

    It does not where a word of several vectors stands in capitals or spaces that tokenization levels, and where its
    letters are part of another added token; both are in docs/families.md.
    """
    for token in several(tokenizer):
        found = tokenizer.tokenize(text).count(token)
        if found != text.count(token):
            return False
    return not any(token in tokenizer.tokenize(text) and token not in text for token in several(tokenizer))


@QUICK
@given(text=TEXTS)
def test_any_prompt_gives_the_ids_that_diffusers_feeds(with_words: tuple[ClipTokenizer, Any], text: str) -> None:
    ours, theirs = with_words
    if is_clear(text, theirs):
        assert ours([text])[0].tolist() == read_by_diffusers(theirs, text)


@pytest.mark.parametrize("prompt", [
    "a photo of <cat-toy>", "<cat-toy>,<cat-toy>!", "a<cat-toy>b", "", "a bad_prompt cat", "a bad_prompt_version2 cat",
    "bad_prompt, <cat-toy>", "fünf two words", "##", "many 🍎", "a cat, catalogue", "apple " * 20 + "<cat-toy>",
    "apple " * 21 + "<cat-toy>", "<one>", "x", "many0",
])
def test_words_of_several_vectors_are_read_as_diffusers_reads_them(
    with_words: tuple[ClipTokenizer, Any], prompt: str
) -> None:
    ours, theirs = with_words
    assert ours([prompt])[0].tolist() == read_by_diffusers(theirs, prompt)
    assert ours.windows([(prompt, 1.0)])[0][0].tolist() == ours([prompt])[0].tolist()


def ids_of(theirs: Any, *tokens: str) -> list[int]:
    found: list[int] = theirs.convert_tokens_to_ids(list(tokens))
    return found


def test_only_whole_tokens_are_expanded_where_diffusers_breaks_names_apart(
    with_words: tuple[ClipTokenizer, Any]
) -> None:
    """`prompt.replace(token, replacement)`, loaders/textual_inversion.py:176: also within a longer name."""
    ours, theirs = with_words
    prompt = "bad_prompt bad_prompt_version2"
    wanted = ids_of(theirs, "bad_prompt", "bad_prompt_1", "bad_prompt_version2", "bad_prompt_version2_1")
    assert ours([prompt])[0][1:5].tolist() == wanted
    assert read_by_diffusers(theirs, prompt)[1:5] != wanted
    written_out = "<cat-toy> <cat-toy>_1 <cat-toy>_2"
    assert ours([written_out])[0][1:6].tolist() == ids_of(
        theirs, "<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<cat-toy>_1", "<cat-toy>_2")


@pytest.mark.parametrize(("name", "prompt"), [("Bad_Hands", "a Bad_Hands cat"), ("Bad_Hands", "a bad_hands cat"),
                                              ("<low>", "a <LOW> cat"), ("Großes", "GROßES")])
def test_capitals_do_not_cost_a_word_its_further_vectors(tmp_path: Path, name: str, prompt: str) -> None:
    """diffusers looks up what the tokenizer found, which is in lower case: textual_inversion.py:169."""
    ours, theirs = both(clip(tmp_path / "t", [name, f"{name}_1", f"{name}_2"]))
    wanted = ids_of(theirs, name, f"{name}_1", f"{name}_2")
    for tokenize, expected in ((lambda text: ours([text])[0].tolist(), wanted),
                               (lambda text: read_by_diffusers(theirs, text), wanted[:1])):
        found = [i for i in tokenize(prompt) if i in wanted]
        assert found == expected


def test_unknown_and_single_words_have_no_further_vectors(with_words: tuple[ClipTokenizer, Any]) -> None:
    ours, theirs = with_words
    words = {theirs.convert_ids_to_tokens(i): len(further) for i, further in ours.words.items()}
    assert words == {"<cat-toy>": 2, "bad_prompt": 1, "bad_prompt_version2": 1, "fünf": 1, "two words": 1, "#": 1,
                     "🍎": 1, "many": 11}


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "normalized"])
@pytest.mark.parametrize("prompt", ["a <toy> cat", "a <toy>b", "x <toy>, <TOY>", "  <toy>  <toy>", "toy", "a  < toy>"])
def test_every_rule_of_added_tokens_is_followed(tmp_path: Path, flag: str, prompt: str) -> None:
    token = AddedToken("<toy>", special=False, **{"normalized": False, flag: True})
    ours, theirs = both(clip(tmp_path / "t", [token, AddedToken("plain_word", single_word=True)]))
    for text in (prompt, prompt.replace("<toy>", "plain_word")):
        assert ours([text])[0].tolist() == read_by_diffusers(theirs, text)


def layout_decoder(folder: Path, tokens: dict[str, int]) -> None:
    vocab = make_vocabulary()[0]
    start, end = "<|startoftext|>", "<|endoftext|>"
    decoder = {vocab[start]: {**flags(start, True), "special": True},
               vocab[end]: {**flags(end, False), "special": True},
               **{i: {**flags(token, True), "special": False} for token, i in tokens.items()}}
    write_old(folder, make_vocabulary(), {"added_tokens_decoder": {str(i): t for i, t in decoder.items()}}, {})


def layout_added(folder: Path, tokens: dict[str, int]) -> None:
    write_old(folder, make_vocabulary(), {"model_max_length": LENGTH}, {"bos_token": "<|startoftext|>"})
    (folder / "added_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")


def layout_whole(folder: Path, tokens: dict[str, int]) -> None:
    clip(folder, [])
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] += [{"id": i, **flags(token, True), "special": False} for token, i in tokens.items()]
    file.write_text(json.dumps(content), encoding="utf-8")


LAYOUTS = [layout_decoder, layout_added, layout_whole]


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize("order", [0, 1])
def test_words_are_found_in_every_layout_of_a_saved_tokenizer(
    write: Callable[[Path, dict[str, int]], None], order: int, tmp_path: Path
) -> None:
    first = len(make_vocabulary()[0])
    names = ["<toy>", "<toy>_1", "<toy>_2", "bag", "bag_1"]
    numbers = range(first, first + 5) if order == 0 else range(first + 4, first - 1, -1)
    write(tmp_path / "t", dict(zip(names, numbers, strict=True)))
    ours, theirs = both(tmp_path / "t")
    for prompt in ("a <toy>, bag", "bags", "<toy>_1"):
        assert ours([prompt])[0].tolist() == read_by_diffusers(theirs, prompt)
    assert ours(["<toy>"])[0][1:4].tolist() == list(numbers[:3])


@pytest.mark.parametrize("write", LAYOUTS)
def test_ids_with_gaps_are_refused_since_transformers_numbers_them_through(
    write: Callable[[Path, dict[str, int]], None], tmp_path: Path
) -> None:
    """The vectors are at the ids of the files; transformers 5 would read others for the same words."""
    first = len(make_vocabulary()[0])
    write(tmp_path / "t", {"<a>": first, "<b>": first + 3})
    assert CLIPTokenizer.from_pretrained(tmp_path / "t").convert_tokens_to_ids("<b>") == first + 1
    with pytest.raises(InputError, match=rf"<b> is {first + 3} in the files and {first + 1} to transformers"):
        prepare_tokenizer(tmp_path / "t", tmp_path / "out")


def test_a_token_without_a_row_in_the_text_encoder_is_refused(tmp_path: Path) -> None:
    folder, rows = clip(tmp_path / "t", ["<toy>", "<toy>_1"]), len(make_vocabulary()[0]) + 2
    assert prepare_tokenizer(folder, tmp_path / "out", rows) == LENGTH
    prepare_tokenizer(folder, tmp_path / "out", rows + 64)  # a padded table
    with pytest.raises(InputError, match=f"the token '<toy>_1' has id {rows - 1}, the text encoder's table only"):
        prepare_tokenizer(folder, tmp_path / "out", rows - 1)
    with pytest.raises(InputError, match="resize_token_embeddings"):
        check_rows(tmp_path / "out", 5, "here")


@pytest.mark.parametrize(("key", "value"), [("padding_side", "left"), ("truncation_side", "left"),
                                            ("split_special_tokens", True)])
def test_a_setting_that_changes_ids_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    folder = write_old(tmp_path / "t", make_vocabulary(), {key: value}, {})
    with pytest.raises(InputError, match=f"{key} is {value!r}"):
        prepare_tokenizer(folder, tmp_path / "out")


@pytest.mark.parametrize("config", [{"additional_special_tokens": ["<toy>", "<toy>_1"]},
                                    {"extra_special_tokens": ["<toy>", "<toy>_1"]},
                                    {"do_lower_case": False, "add_prefix_space": True}, {"errors": "strict"}])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_further_special_tokens_are_added_tokens(tmp_path: Path, config: dict[str, Any], place: str) -> None:
    own = {"tokenizer_config.json": {}, "special_tokens_map.json": {}, place: config}
    folder = write_old(tmp_path / "t", make_vocabulary(), own["tokenizer_config.json"], own["special_tokens_map.json"])
    ours, theirs = both(folder)
    for prompt in ("a <toy> cat", "<TOY>_1", "RED apple<|endoftext|> house"):
        assert ours([prompt])[0].tolist() == read_by_diffusers(theirs, prompt)


@pytest.mark.parametrize(("stated", "expected"), [(None, None), (10**30, None), (64, 64), (77, 77)])
def test_the_stated_length(tmp_path: Path, stated: int | None, expected: int | None) -> None:
    """Where none is stated, diffusers stops with an OverflowError; the text encoder's positions are the answer then."""
    config = {} if stated is None else {"model_max_length": stated}
    folder = write_old(tmp_path / "t", make_vocabulary(), config, {})
    assert prepare_tokenizer(folder, tmp_path / "out") == expected
    theirs = CLIPTokenizer.from_pretrained(folder)
    if expected is None:
        with pytest.raises(OverflowError):
            read_by_diffusers(theirs, "a", theirs.model_max_length)
    else:
        assert len(read_by_diffusers(theirs, "a", theirs.model_max_length)) == expected


def test_a_prompt_of_a_hundred_thousand_characters_is_cut_as_diffusers_cuts_it(
    with_words: tuple[ClipTokenizer, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = with_words
    text = "red <cat-toy> " * 7000
    assert ours([text])[0].tolist() == read_by_diffusers(theirs, text)
    assert len(caplog.text) < 1000 and "characters in all" in caplog.text


def test_a_row_without_room_for_all_vectors_holds_the_first(with_words: tuple[ClipTokenizer, Any]) -> None:
    theirs = with_words[1]
    ours = ClipTokenizer(theirs._tokenizer.from_str(theirs._tokenizer.to_str()), 4, "<|endoftext|>")
    assert ours(["<cat-toy>"])[0].tolist() == read_by_diffusers(theirs, "<cat-toy>", 4)
    assert ours.windows([("<cat-toy>", 1.0)])[1][0][1:2].tolist() == ids_of(theirs, "<cat-toy>_2")


@pytest.mark.parametrize(("file", "content", "words"), [
    ("tokenizer_config.json", {"cls_token": "<s>"}, "cls_token is '<s>'"),
    ("added_tokens.json", {"<toy>": 30}, "<toy> is an added token"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"30": {"content": "<toy>"}}}, "<toy> is an added token"),
    ("special_tokens_map.json", {"additional_special_tokens": ["<toy>"]}, "<toy> is an added token"),
])
def test_a_bert_tokenizer_with_words_of_its_own_is_refused(
    tmp_path: Path, file: str, content: dict[str, Any], words: str
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS), encoding="utf-8")
    assert prepare_tokenizer(tmp_path, tmp_path / "out") is None
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        prepare_tokenizer(tmp_path, tmp_path / "out")


BERT_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red apple ##s cat on the house blue dog , ! 3 ##d é 漢 ##e".split()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipTokenizer, Any]:
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(BERT_WORDS)}, model_max_length=77).save_pretrained(folder)
    assert prepare_tokenizer(folder, folder / "ours") == 77
    return ClipTokenizer.load(folder / "ours", LENGTH), BertTokenizer.from_pretrained(folder)


@QUICK
@given(text=st.lists(st.sampled_from([*PIECES, *BERT_WORDS, " ", "cats", "RED"]) | st.text(max_size=6)).map("".join))
def test_any_prompt_gives_berts_ids(bert: tuple[ClipTokenizer, Any], text: str) -> None:
    ours, theirs = bert
    expected = theirs(text, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert np.array_equal(ours([text])[0], expected)
