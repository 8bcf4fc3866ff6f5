"""Tokenizes prompts for CLIP through `tokenizers` alone, and converts published tokenizer folders to ours.

Equal to transformers' `CLIPTokenizer`, which rebuilds normalizer and splitting from the vocabulary, the merges and the
added tokens whichever layout a folder has. So does `prepare_tokenizer`; the bundle then holds the finished result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import BundleError, InputError
from runtimes.text.bert_tokenizer import BERT, is_bert, prepare_bert_tokenizer
from runtimes.text.tokenizer_files import (
    MARKERS,
    first_line,
    from_bpe_files,
    from_tokenizer_json,
    read_object,
    special_tokens,
    tokens_of,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

MAX_CHARACTERS = 100_000  # far above what any text encoder reads, far below what makes a tokenizer slow
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# transformers/models/clip/tokenization_clip.py; OpenAI CLIP's simple_tokenizer.py
_WORD = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_LONGEST_QUOTE = 500
# Settings of tokenizer_config.json that change ids -> the one value that the runtime knows.
_PLAIN = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
# transformers writes 10**30 where no length was given
_ABSURD_LENGTH = 1_000_000

logger = logging.getLogger(__name__)


class ClipTokenizer:
    """Prompts to ids. Immutable after loading, so threads may share it.

    Attributes:
        tokens: length of every row, both markers counted.
        words: id of a word -> ids of its further vectors: textual inversions, wherever they were saved.
        pad_id: id that fills a row after the end marker ("!" in Stable Diffusion 2, the end marker elsewhere).
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int, pad_token: str, *, inversions: bool = True) -> None:
        """Take a tokenizer of `tokenizers`.

        Args:
            tokenizer: its post-processor adds the markers.
            tokens: length of every row.
            pad_token: what fills it.
            inversions: whether `cat`, `cat_1`, `cat_2` among the added tokens are the vectors of one word.

        Raises:
            BundleError: the padding token is not in the vocabulary.
        """
        pad_id = tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise BundleError(f"the padding token {pad_token!r} is not in the vocabulary", where=TOKENIZER_FILE)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokens, self.pad_id, self._tokenizer = tokens, int(pad_id), tokenizer
        self.words = _words_of_several_vectors(tokenizer) if inversions else {}
        self._start, self._end = tokenizer.encode("").ids

    @classmethod
    def load(cls, folder: Path | str, tokens: int) -> ClipTokenizer:
        """Read a folder that `prepare_tokenizer` wrote.

        Raises:
            BundleError: a file is missing or not what `tokenizers` reads.
        """
        from tokenizers import Tokenizer

        file = Path(folder) / TOKENIZER_FILE
        try:
            tokenizer = Tokenizer.from_file(str(file))
            config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
            pad_token, inversions = config["pad_token"], config.get("tokenizer_class") != BERT
        except Exception as error:  # `tokenizers` raises bare Exception
            raise BundleError(f"cannot read the tokenizer: {first_line(error)}", where=str(folder),
                              fix="build the bundle again") from error
        return cls(tokenizer, tokens, pad_token, inversions=inversions)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokenize prompts.

        Args:
            texts: any strings; a text that needs more than `tokens` is cut with a logged warning that quotes the rest.

        Returns:
            token ids (B, tokens) int64, a row for each text: start marker first, end marker last before the padding.

        Raises:
            InputError: a text is not a string, not valid Unicode, or longer than 100,000 characters.
        """
        rows = np.empty((len(texts), self.tokens), np.int64)
        room = self.tokens - 2
        for row, text in enumerate(texts):
            ids, starts = self._read(text)
            rows[row] = self._row(ids[:room])
            if len(ids) > room:
                logger.warning("the prompt is longer than %d tokens; this part of it was cut: %s",
                               self.tokens, _quoted(text[starts[room]:]))
        return rows

    def windows(self, fragments: Sequence[tuple[str, float]]) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Tokenize a prompt of any length into rows of their own markers, `tokens` - 2 tokens of text each.

        Args:
            fragments: pieces of text with their weights; a border between two is one between words.

        Returns:
            at least one window: (tokens,) int64 ids and the weight of each, (tokens,) float32, 1 for markers.

        Raises:
            InputError: as `__call__`.
        """
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in fragments:
            found, _ = self._read(text)
            ids += found
            weights += [weight] * len(found)
        room = self.tokens - 2
        windows = []
        for first in range(0, max(len(ids), 1), room):
            part, own = ids[first : first + room], weights[first : first + room]
            scale = np.ones(self.tokens, np.float32)
            scale[1 : len(part) + 1] = own
            windows.append((self._row(part), scale))
        return windows

    def _read(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text of any length, without markers, and where in the text each begins.

        A word of several vectors is followed by the further ones. diffusers' `maybe_convert_prompt` writes their names
        into the text, which finds the word inside other words too; here whole tokens count, as the tokenizer found
        them: the longest that begins at a place.
        """
        check_text(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not self.words:
            return encoding.ids, [start for start, _ in encoding.offsets]
        ids: list[int] = []
        starts: list[int] = []
        for found, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            whole = (found, *self.words.get(found, ()))
            ids += whole
            starts += [start] * len(whole)
        return ids, starts

    def _row(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """At most `tokens` - 2 ids with their markers and padding: (tokens,) int64."""
        row = np.full(self.tokens, self.pad_id, np.int64)
        row[: len(ids) + 2] = [self._start, *ids, self._end]
        return row


def _words_of_several_vectors(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Among the added tokens, `word`, `word_1`, `word_2` ...: id of the word -> ids of the others.

    The rule of diffusers' `TextualInversionLoaderMixin._maybe_convert_prompt` (loaders/textual_inversion.py), which
    knows nothing of the files either.
    """
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    words = {}
    for content, number in added.items():
        names = takewhile(added.__contains__, (f"{content}_{i}" for i in count(1)))
        if further := tuple(added[name] for name in names):
            words[number] = further
    return words


def check_text(text: object, what: str = "the prompt") -> None:
    """Refuse what no tokenizer should be given.

    Raises:
        InputError: not a string, not valid Unicode, or longer than 100,000 characters.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, expected a string")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{what} has {len(text):,} characters, at most {MAX_CHARACTERS:,} are accepted",
                         fix="shorten it; only the first tokens would be used")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode at character {error.start}",
                         fix="remove the unpaired surrogate") from error


def tokenizer_json_from_bpe(
    vocab_file: Path | str, merges_file: Path | str, added: Iterable[AddedToken] | None = None
) -> str:
    """The text of a tokenizer.json equal to CLIP's, from the two files of older releases.

    Args:
        vocab_file: vocab.json, a mapping of token to id.
        merges_file: merges.txt, a pair a line after an optional version line.
        added: tokens found in the text before it is split; by default the two markers.

    Raises:
        InputError: a file is missing or malformed, or a marker is not in the vocabulary.
    """
    vocab, merges = from_bpe_files(vocab_file, merges_file)
    return _clip_json(vocab, merges, list(added) if added is not None else tokens_of(MARKERS), MARKERS,
                      str(vocab_file))


def prepare_tokenizer(source_folder: Path | str, out_folder: Path | str, rows: int | None = None) -> int | None:
    """Write tokenizer.json and a small tokenizer_config.json from a published tokenizer folder of either layout.

    Args:
        source_folder: as transformers saves it.
        out_folder: receives the files.
        rows: of the text encoder's table of embeddings, which every id must be below; None leaves that unchecked.

    Returns:
        the longest prompt in tokens that the source states, or None where it states none.

    Raises:
        InputError: no tokenizer there, files that are malformed or contradict each other, a setting that changes ids
            and is not honoured, or a token that the text encoder has no row for.
    """
    source, out = Path(source_folder), Path(out_folder)
    length = _prepare(source, out)
    if rows is not None:
        check_rows(out, rows, str(source))
    return length


def check_rows(folder: Path, rows: int, where: str) -> None:
    """Refuse a tokenizer of a bundle that gives ids which the text encoder has no embedding for.

    Args:
        folder: from `prepare_tokenizer`.
        rows: of the text encoder's table.
        where: said in the error.

    Raises:
        InputError: naming the token of the largest id.
    """
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        raise InputError(f"the token {token!r} has id {vocabulary[token]}, the text encoder's table only {rows} rows",
                         where=where, fix="save tokenizer and text encoder again together "
                                          "(resize_token_embeddings), or take the token out")


def _prepare(source: Path, out: Path) -> int | None:
    config = read_object(source / CONFIG_FILE) or {}
    for key, value in _PLAIN.items():
        if config.get(key, value) != value:
            raise InputError(f"{key} is {config[key]!r}, which the runtime does not do",
                             where=str(source / CONFIG_FILE), fix=f"save the tokenizer with {key}={value!r}")
    if is_bert(source, config):
        return prepare_bert_tokenizer(source, out, config)
    whole = read_object(source / TOKENIZER_FILE)
    names, added, ids = special_tokens(source, config, whole)
    if whole is not None:
        vocab, merges = from_tokenizer_json(whole, source / TOKENIZER_FILE)
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        vocab, merges = from_bpe_files(source / "vocab.json", source / "merges.txt")
    else:
        raise InputError("no tokenizer: neither tokenizer.json nor vocab.json with merges.txt", where=str(source),
                         fix="download the model again")
    text = _clip_json(vocab, merges, added, names, str(source))
    written = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    if wrong := sorted(t for t, i in ids.items() if written.get(t, i) != i):
        first = wrong[0]
        raise InputError(f"the ids of the added tokens {', '.join(wrong)} contradict the vocabulary: {first} is "
                         f"{ids[first]} in the files and {written[first]} to transformers 5, which numbers added "
                         "tokens through after the vocabulary", where=str(source),
                         fix="save tokenizer and text encoder again without gaps between the ids")
    length = config.get("model_max_length")
    length = int(length) if isinstance(length, int | float) and 2 < length < _ABSURD_LENGTH else None
    small = {name: names[name] for name in MARKERS} | {"model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    out.mkdir(parents=True, exist_ok=True)
    (out / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    (out / CONFIG_FILE).write_text(json.dumps(small, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
                                   encoding="utf-8")
    return length


def _clip_json(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: list[AddedToken], names: Mapping[str, str],
    where: str,
) -> str:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    try:
        tokenizer = Tokenizer(BPE(vocab=dict(vocab), merges=list(merges), continuing_subword_prefix="",
                                  end_of_word_suffix="</w>", fuse_unk=False, unk_token=names["unk_token"]))
    except Exception as error:  # `tokenizers` raises bare Exception, e.g. for a merge that is not in the vocabulary
        raise InputError(f"vocabulary and merges do not fit: {first_line(error)}", where=where) from error
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    start, end = (_numbered(tokenizer, names[name], where) for name in ("bos_token", "eos_token"))
    _numbered(tokenizer, names["pad_token"], where)
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return str(tokenizer.to_str(pretty=True))


def _numbered(tokenizer: Tokenizer, token: str, where: str) -> tuple[str, int]:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputError(f"{token} is not in the vocabulary", where=where, fix="download the tokenizer again")
    return token, number


def _quoted(text: str) -> str:
    cut = f"{text[:_LONGEST_QUOTE]!r}, {len(text):,} characters in all"
    return repr(text) if len(text) <= _LONGEST_QUOTE else cut
