"""Embedding files against diffusers' `load_textual_inversion`: the same ids for a prompt, the same vectors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.adapters.textual_inversion import add_words, extend_tokenizer, read_embedding
from runtimes.errors import InputError
from runtimes.text.clip_tokenizer import ClipTokenizer, prepare_tokenizer
from tests.exporters.family_pipelines import make_pipeline
from tests.exporters.lora_files import copy_of
from tests.runtimes.test_words import read_by_diffusers

ENCODERS = ("text_encoder", "text_encoder_2")
LENGTH = 16


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: make_pipeline(name) for name in ("sd2", "xl", "refiner")}


def fresh(pipe: Any) -> Any:
    """The same pipeline over text encoders and tokenizers of its own."""
    theirs = copy_of(pipe)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(theirs, name, None) is not None:
            setattr(theirs, name, copy.deepcopy(getattr(theirs, name)))
    return theirs


def own_encoders(pipe: Any) -> list[str]:
    return [name for name in ENCODERS if getattr(pipe, name, None) is not None]


def widths_of(pipe: Any) -> dict[str, int]:
    return {name: getattr(pipe, name).config.hidden_size for name in own_encoders(pipe)}


def taught(pipe: Any, folder: Path, *files: tuple[Path, str]) -> dict[str, tuple[ClipTokenizer, torch.Tensor]]:
    """Text encoder -> its tokenizer and table after `build --embedding`."""
    words = [read_embedding(file, token, widths_of(pipe)) for file, token in files]
    found = {}
    for name in own_encoders(pipe):
        tokenizer = name.replace("text_encoder", "tokenizer")
        getattr(pipe, tokenizer).save_pretrained(folder / tokenizer)
        prepare_tokenizer(folder / tokenizer, folder / "before" / tokenizer)
        module = copy.deepcopy(getattr(pipe, name))
        rows = add_words(module, name, words, folder / "before" / tokenizer)
        extend_tokenizer(folder / "before" / tokenizer, name, words, folder / "after" / tokenizer)
        table = module.get_input_embeddings().weight
        assert len(table) == rows
        found[name] = ClipTokenizer.load(folder / "after" / tokenizer, LENGTH), table
    return found


def assert_read_alike(ours: dict[str, tuple[ClipTokenizer, torch.Tensor]], theirs: Any, *prompts: str) -> None:
    """The embeddings that go into each text encoder are the same numbers."""
    for name, (tokenize, table) in ours.items():
        tokenizer = getattr(theirs, name.replace("text_encoder", "tokenizer"))
        expected = getattr(theirs, name).get_input_embeddings().weight
        for prompt in prompts:
            ids = read_by_diffusers(tokenizer, prompt, LENGTH)
            assert tokenize([prompt])[0].tolist() == ids
            assert torch.equal(table[ids], expected[ids])


def vectors(count: int | None, width: int, seed: int = 0) -> torch.Tensor:
    shape = (width,) if count is None else (count, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(file: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize(("key", "token"), [("<cat>", ""), ("<cat>", "other"), ("emb_params", "<cat>"),
                                            ("*", "two words"), ("fünf 🍎", "")])
def test_a_file_of_one_tensor_is_read_as_diffusers_reads_it(
    pipes: dict[str, Any], dtype: torch.dtype, count: int | None, key: str, token: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "e.safetensors", **{key: vectors(count, 16).to(dtype)})
    theirs, name = fresh(pipes["sd2"]), token or key
    theirs.load_textual_inversion(str(file), token=token or None)
    assert_read_alike(taught(pipes["sd2"], tmp_path, (file, token)), theirs, f"a {name} apple", f"{name},{name}",
                      "a red apple")


def test_several_files_follow_each_other(pipes: dict[str, Any], tmp_path: Path) -> None:
    files = [(written(tmp_path / f"{i}.safetensors", emb_params=vectors(count, 16, i)), token)
             for i, (count, token) in enumerate(((2, "bad_prompt"), (3, "bad_prompt_version2"), (1, "<one>")))]
    theirs = fresh(pipes["sd2"])
    for file, token in files:
        theirs.load_textual_inversion(str(file), token=token)
    assert_read_alike(taught(pipes["sd2"], tmp_path, *files), theirs, "a bad_prompt cat", "bad_prompt_version2!",
                      "<one>, bad_prompt", "a cat")


@pytest.mark.parametrize("rows", [-1, 0, 64])
def test_a_table_that_is_longer_than_the_vocabulary_gets_the_vectors_where_the_ids_point(
    pipes: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    pipe = fresh(pipes["sd2"])
    if rows:
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + max(rows, 0))
    file = written(tmp_path / "e.safetensors", **{"<cat>": vectors(3, 16)})
    theirs = fresh(pipe)
    theirs.load_textual_inversion(str(file))
    assert_read_alike(taught(pipe, tmp_path, (file, "")), theirs, "a <cat>", "a red apple")


@pytest.mark.parametrize(("counts", "prompt"), [((2, 2), "a <cat> apple"), ((1, 3), "<cat>"), ((4, 1), "<cat> <cat>")])
def test_both_text_encoders_of_xl_have_vectors_and_numbers_of_their_own(
    pipes: dict[str, Any], counts: tuple[int, int], prompt: str, tmp_path: Path
) -> None:
    own = widths_of(pipes["xl"])
    file = written(tmp_path / "<cat>.safetensors", clip_l=vectors(counts[0], own["text_encoder"]),
                   clip_g=vectors(counts[1], own["text_encoder_2"], 1))
    theirs = fresh(pipes["xl"])
    for key, end in (("clip_l", ""), ("clip_g", "_2")):  # as diffusers' documentation says
        theirs.load_textual_inversion(load_file(file)[key], token="<cat>", text_encoder=getattr(
            theirs, f"text_encoder{end}"), tokenizer=getattr(theirs, f"tokenizer{end}"))
    assert_read_alike(taught(pipes["xl"], tmp_path, (file, "")), theirs, prompt, "a red apple")


@pytest.mark.parametrize("key", ["clip_l", "clip_g", "<cat>", "emb_params"])
@pytest.mark.parametrize("end", ["", "_2"])
def test_an_embedding_for_one_text_encoder_of_xl_is_text_to_the_other(
    pipes: dict[str, Any], key: str, end: str, tmp_path: Path
) -> None:
    """diffusers loads into `text_encoder` unless told another; a file for the second's width is for the second."""
    encoder = f"text_encoder{end}"
    file = written(tmp_path / "e.safetensors", **{key: vectors(2, widths_of(pipes["xl"])[encoder])})
    if key in ("clip_l", "clip_g") and (key == "clip_g") != bool(end):
        with pytest.raises(InputError, match=f"{key} has .* numbers a vector, the text_encoder"):
            read_embedding(file, "<cat>", widths_of(pipes["xl"]))
        return
    theirs = fresh(pipes["xl"])
    theirs.load_textual_inversion(str(file), token="<cat>", text_encoder=getattr(theirs, encoder),
                                  tokenizer=getattr(theirs, f"tokenizer{end}"))
    assert_read_alike(taught(pipes["xl"], tmp_path, (file, "<cat>")), theirs, "a <cat> apple", "a red apple")


def test_the_refiners_one_text_encoder_takes_a_file_of_its_width(pipes: dict[str, Any], tmp_path: Path) -> None:
    own = widths_of(pipes["refiner"])
    assert list(own) == ["text_encoder_2"]
    file = written(tmp_path / "e.safetensors", **{"<cat>": vectors(2, own["text_encoder_2"])})
    theirs = fresh(pipes["refiner"])
    theirs.load_textual_inversion(str(file), text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2)
    assert_read_alike(taught(pipes["refiner"], tmp_path, (file, "")), theirs, "a <cat> apple")


@pytest.mark.parametrize(("token", "present", "count"), [
    ("apple", [], 1), ("apple</w>", [], 2), ("<|endoftext|>", [], 1), ("<cat>", ["<cat>"], 1),
    ("<cat>", ["<cat>_1"], 1), ("<cat>", ["<cat>_1"], 3)])
def test_a_token_that_exists_is_refused_as_by_diffusers(
    pipes: dict[str, Any], token: str, present: list[str], count: int, tmp_path: Path
) -> None:
    pipe = fresh(pipes["sd2"])
    if token not in pipe.tokenizer.get_vocab():
        pipe.tokenizer.add_tokens(present or [token])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    file = written(tmp_path / "e.safetensors", emb_params=vectors(count, 16))
    with pytest.raises(InputError, match="exists already"):
        taught(pipe, tmp_path, (file, token))
    with pytest.raises(ValueError, match="already in tokenizer vocabulary"):
        fresh(pipe).load_textual_inversion(str(file), token=token)


@pytest.mark.parametrize(("tensors", "words"), [
    ({}, "no embedding"),
    ({"a": torch.ones(2, 16), "b": torch.ones(2, 16)}, "b is not an embedding"),
    ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16), "x": torch.ones(1)}, "is not an embedding"),
    ({"a": torch.ones(1, 2, 16)}, "a is not an embedding"), ({"a": torch.ones(())}, "a is not an embedding"),
    ({"a": torch.ones(0, 16)}, "a is not an embedding"), ({"a": torch.ones(2, 16, dtype=torch.int64)}, "a is not"),
    ({"a": torch.ones(2, 17)}, "17 numbers a vector, the text_encoder 16"), ({" ": torch.ones(2, 16)}, "is empty"),
])
def test_what_is_no_embedding_for_this_model_is_refused_by_name(
    tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "e.safetensors", **tensors)
    with pytest.raises(InputError, match=words):
        read_embedding(file, "", {"text_encoder": 16})


def test_a_token_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "e.safetensors", emb_params=vectors(1, 16))
    with pytest.raises(InputError, match="not valid Unicode"):
        read_embedding(file, "\udc80")


def test_pipelines_for_which_diffusers_loads_no_embeddings_refuse_them(tmp_path: Path) -> None:
    make_pipeline("ldm-text").tokenizer.save_pretrained(tmp_path / "t")
    prepare_tokenizer(tmp_path / "t", tmp_path / "before")
    words = [read_embedding(written(tmp_path / "e.safetensors", emb_params=vectors(1, 16)), "<cat>")]
    with pytest.raises(InputError, match="take no embeddings"):
        extend_tokenizer(tmp_path / "before", "text_encoder", words, tmp_path / "after")
