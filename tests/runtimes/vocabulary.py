"""A small byte-pair vocabulary in OpenAI CLIP's order, for tests that need a real tokenizer."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

WORDS = """a an the red green blue apple grinning face cat dog house tree sun moon star heart hand fish bird car ship
flower rocket smiling crying person woman man child running under over near photo of image painting it's they're
don't we'll i've 3d 2024 café naïve über straße""".split()

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


def make_vocabulary() -> Vocabulary:
    """Bytes, bytes that end a word, merges, the two markers; "!" has id 0 as in CLIP's."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(WORDS * 3, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))
    merges = [(a, b) for a, b in json.loads(bpe.to_str())["model"]["merges"]]
    words = ["!", *(a for a in alphabet if a != "!"), *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges
