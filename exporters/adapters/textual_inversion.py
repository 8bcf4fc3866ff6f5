"""Textual inversion (Gal et al., arXiv 2208.01618): learned embeddings that become new words of tokenizer and encoder.

Diffusers' files hold one tensor named by its token; those of A1111 hold `emb_params`, or `clip_l` and `clip_g` for
Stable Diffusion XL. Several vectors become the tokens `<cat>`, `<cat>_1`, ..., as in diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.adapters.lora_files import NETWORKS
from runtimes.bundle.manifest import Manifest
from runtimes.bundle.safetensors_reader import read_header
from runtimes.errors import InputError
from runtimes.text.bert_tokenizer import BERT
from runtimes.text.clip_tokenizer import check_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_UNNAMED = "emb_params"
_ENCODERS = {"clip_l": NETWORKS["lora_te1_"], "clip_g": NETWORKS["lora_te2_"]}
_FIRST = _ENCODERS["clip_l"]
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Embedding:
    """One learned word.

    Attributes:
        file: safetensors.
        token: what a prompt calls it.
        keys: text encoder, as adapters call it -> key of its vectors in the file; one that is not here reads the word
            as text.
        vectors: text encoder -> how many tokens it becomes.
        widths: text encoder -> width of its vectors.
    """

    file: Path
    token: str
    keys: Mapping[str, str]
    vectors: Mapping[str, int]
    widths: Mapping[str, int]

    def tokens(self, encoder: str) -> tuple[str, ...]:
        """The tokens of its vectors in one text encoder, in order."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.vectors[encoder])))


def read_embedding(file: Path, token: str = "", widths: Mapping[str, int] | None = None) -> Embedding:
    """Read the header of a file.

    Args:
        file: safetensors.
        token: what prompts call it; by default the file's own name for it, else the file's name.
        widths: text encoder -> width of its embeddings. A file of one tensor is for the first of that width, as
            diffusers loads it into the first text encoder by default; None leaves the width unchecked.

    Raises:
        InputError: a pickle, a file with anything but vectors, or vectors of a width that the model does not have.
    """
    if file.suffix != ".safetensors":
        raise InputError("an embedding must be a .safetensors file; pickles (.pt, .bin) can run code when they are "
                         "read: refused", where=str(file), fix="convert it where you trust it")
    if not file.is_file():
        raise InputError("no such file", where=str(file), fix="give an embedding file")
    header = read_header(file)
    if header and header.keys() <= _ENCODERS.keys():
        keys = {_ENCODERS[key]: key for key in sorted(header, reverse=True)}  # clip_l first
    else:
        keys = {_FIRST: next(iter(sorted(header)), "")}
    for key in sorted(header.keys() - set(keys.values())) or [k for k in sorted(header) if not _is_vectors(header[k])]:
        raise InputError(f"{key} is not an embedding: one tensor of (vectors, width) numbers is expected, or clip_l "
                         "and clip_g", where=str(file), fix="give a textual inversion file")
    if not header:
        raise InputError("it holds no embedding", where=str(file), fix="give a textual inversion file")
    shapes = {encoder: [1, *header[key]["shape"]][-2:] for encoder, key in keys.items()}
    if widths and not header.keys() <= _ENCODERS.keys():
        width = shapes[_FIRST][1]
        own = next((name for name, other in widths.items() if other == width), next(iter(widths)))
        keys, shapes = {own: keys[_FIRST]}, {own: shapes[_FIRST]}
    for encoder, (_, width) in shapes.items():
        if widths is not None and widths.get(encoder, width) != width:
            raise InputError(f"{keys[encoder]} has {width} numbers a vector, the {encoder} {widths[encoder]}",
                             where=str(file), fix="use an embedding that was trained for this model")
    first = next(iter(keys.values()))
    name = token or (file.stem if first == _UNNAMED or first in _ENCODERS else first)
    check_text(name, "the embedding's token")
    if not name.strip():
        raise InputError("the embedding's token is empty", where=str(file), fix="name one: --embedding FILE:TOKEN")
    return Embedding(file, name, keys, {c: s[0] for c, s in shapes.items()}, {c: s[1] for c, s in shapes.items()})


def _is_vectors(entry: Mapping[str, object]) -> bool:
    shape = entry["shape"]
    return entry["dtype"] in _FLOATS and isinstance(shape, list) and len(shape) in (1, 2) and 0 not in shape


def encoder_widths(manifest: Manifest) -> dict[str, int]:
    """Text encoder, as adapters call it -> width of its hidden states, which is that of its embeddings."""
    readers = {reader.adapter: (reader, manifest.components[reader.component].outputs)
               for reader in manifest.pipeline.conditioner.encoders}
    return {name: int(next(spec.shape[-1] for spec in outputs if spec.name == reader.hidden))
            for name, (reader, outputs) in readers.items()}


def words_of(encoder: str, embeddings: Sequence[Embedding]) -> list[Embedding]:
    """Those that one text encoder learns."""
    return [embedding for embedding in embeddings if encoder in embedding.keys]


def add_words(module: torch.nn.Module, encoder: str, embeddings: Sequence[Embedding], folder: Path) -> int:
    """Write vectors into a text encoder's table of embeddings, made longer where it has to be.

    Args:
        module: the text encoder, float32.
        encoder: what adapters call it.
        embeddings: all of them; those of other text encoders are passed over.
        folder: of its tokenizer before `extend_tokenizer`, which says the tokens' ids.

    Returns:
        rows of the table afterwards.

    Raises:
        InputError: as `extend_tokenizer`; NaN or infinity.
    """
    import torch
    from safetensors import safe_open

    embeddings = words_of(encoder, embeddings)
    vocabulary = _extended(folder, encoder, embeddings).get_vocab(with_added_tokens=True)
    table = module.get_input_embeddings()  # type: ignore[operator]
    weight = table.weight.data
    for embedding in embeddings:
        key = embedding.keys[encoder]
        with safe_open(embedding.file, framework="pt") as tensors:
            vectors = tensors.get_tensor(key).float().reshape(embedding.vectors[encoder], -1)
        if not bool(torch.isfinite(vectors).all()):
            raise InputError(f"{key} holds NaN or infinity", where=str(embedding.file), fix="get the file again")
        ids = [vocabulary[token] for token in embedding.tokens(encoder)]
        if (missing := max(ids) + 1 - len(weight)) > 0:
            weight = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
        weight[ids] = vectors
    table.weight = torch.nn.Parameter(weight, requires_grad=False)
    table.num_embeddings = len(weight)
    return len(weight)


def extend_tokenizer(folder: Path, encoder: str, embeddings: Sequence[Embedding], out: Path) -> None:
    """Write a tokenizer of a bundle with the new tokens.

    Args:
        folder: the tokenizer.
        encoder: that reads its ids, as adapters call it.
        embeddings: all of them; those of other text encoders are passed over.
        out: receives the files.

    Raises:
        InputError: a token that exists already, or a pipeline for which diffusers loads no embeddings.
    """
    tokenizer = _extended(folder, encoder, words_of(encoder, embeddings))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(str(tokenizer.to_str(pretty=True)), encoding="utf-8")
    (out / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())


def _extended(folder: Path, encoder: str, embeddings: Sequence[Embedding]) -> Tokenizer:
    """A tokenizer with the tokens of embeddings added as diffusers adds them, one after the other."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for embedding in embeddings:
        if config.get("tokenizer_class") == BERT:
            raise InputError("LDMBert's pipelines take no embeddings", where=str(embedding.file),
                             fix="build without --embedding")
        # `cat_1` would make an embedding `cat` of one vector a word of two.
        taken = (*embedding.tokens(encoder), f"{embedding.token}_1")
        if known := [token for token in taken if tokenizer.token_to_id(token) is not None]:
            raise InputError(f"the token {known[0]!r} exists already", where=str(embedding.file),
                             fix="name another one: --embedding FILE:TOKEN")
        tokenizer.add_tokens([AddedToken(token, normalized=True, special=False)
                              for token in embedding.tokens(encoder)])
    return tokenizer
