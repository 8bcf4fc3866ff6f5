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

from runtimes.errors import InputError
from runtimes.weights import read_header

if TYPE_CHECKING:
    import torch

_ANONYMOUS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
MULTI_VECTOR = "multi_vector_tokens"


@dataclass(frozen=True)
class Embedding:
    """One learned word.

    Attributes:
        token: what a prompt calls it.
        keys: component -> key of its vectors in the file.
        vectors: how many tokens it becomes.
        widths: component -> width of its vectors.
    """

    file: Path
    token: str
    keys: Mapping[str, str]
    vectors: int
    widths: Mapping[str, int]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of its vectors, in order."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.vectors)))


def read_embedding(file: Path, token: str = "") -> Embedding:
    """Read the header of a file.

    Args:
        file: safetensors.
        token: what prompts call it; by default the file's own name for it, else the file's name.

    Raises:
        InputError: a pickle, or a file with anything but vectors.
    """
    if file.suffix != ".safetensors":
        raise InputError("an embedding must be a .safetensors file; pickles (.pt, .bin) can run code when they are "
                         "read: refused", where=str(file), fix="convert it where you trust it")
    if not file.is_file():
        raise InputError("no such file", where=str(file), fix="give an embedding file")
    header = read_header(file)
    anonymous = {_ANONYMOUS[key]: key for key in header if key in _ANONYMOUS}
    keys = anonymous or {"text_encoder": next(iter(header), "")}
    if len(header) != len(keys) or any(len(entry["shape"]) not in (1, 2) for entry in header.values()):
        raise InputError(f"{sorted(header)[0] if header else 'nothing'} is not an embedding: one tensor of "
                         "(vectors, width) is expected", where=str(file), fix="give a textual inversion file")
    shapes = {component: [1, *header[key]["shape"]][-2:] for component, key in keys.items()}
    if len({shape[0] for shape in shapes.values()}) != 1:
        raise InputError("its text encoders have different numbers of vectors", where=str(file))
    name = token or (file.stem if anonymous else keys["text_encoder"])
    return Embedding(file, name, keys, next(iter(shapes.values()))[0], {c: s[1] for c, s in shapes.items()})


def add_words(module: torch.nn.Module, component: str, embeddings: Sequence[Embedding], first: int) -> int:
    """Append vectors to a text encoder's table of embeddings.

    Args:
        module: the text encoder, float32.
        component: its name.
        embeddings: in the order of their tokens' numbers.
        first: number of the first new token, from `extend_tokenizer`.

    Returns:
        rows of the table afterwards.

    Raises:
        InputError: a file for a text encoder of another width, or with NaN or infinity.
    """
    import torch
    from safetensors import safe_open

    table = module.get_input_embeddings()  # type: ignore[operator]
    rows = table.weight.data[: max(first, 0)]
    for embedding in embeddings:
        key = embedding.keys.get(component)
        if key is None:
            raise InputError(f"it has no vectors for the {component}", where=str(embedding.file),
                             fix="use an embedding that was trained for this model")
        with safe_open(embedding.file, framework="pt") as tensors:
            vectors = tensors.get_tensor(key).float().reshape(embedding.vectors, -1)
        if vectors.shape[1] != rows.shape[1]:
            raise InputError(f"{key} has {vectors.shape[1]} numbers a vector, the {component} {rows.shape[1]}",
                             where=str(embedding.file), fix="use an embedding that was trained for this model")
        if not bool(torch.isfinite(vectors).all()):
            raise InputError(f"{key} holds NaN or infinity", where=str(embedding.file), fix="get the file again")
        rows = torch.cat([rows, vectors])
    kept = table.weight.data[len(rows) :]  # a table may be longer than the vocabulary
    table.weight = torch.nn.Parameter(torch.cat([rows, kept]), requires_grad=False)
    table.num_embeddings = len(table.weight)
    return len(table.weight)


def next_token(folder: Path) -> int:
    """The number that the next added token of a tokenizer gets."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True))


def extend_tokenizer(folder: Path, embeddings: Sequence[Embedding], out: Path) -> None:
    """Write a tokenizer of a bundle with the new tokens.

    Raises:
        InputError: a token that exists already, or one without letters.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for embedding in embeddings:
        known = [t for t in embedding.tokens if tokenizer.token_to_id(t) is not None]
        if known or not embedding.token.strip():
            raise InputError(f"the token {embedding.token!r} exists already" if known else "the token is empty",
                             where=str(embedding.file), fix="name another one: --embedding FILE:TOKEN")
        tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in embedding.tokens])
        if embedding.vectors > 1:
            config.setdefault(MULTI_VECTOR, {})[embedding.token] = embedding.vectors
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(str(tokenizer.to_str(pretty=True)), encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
