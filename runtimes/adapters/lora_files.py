"""Recognises the keys of LoRA files (diffusers, PEFT, kohya) and computes what each adds to a weight.

Hu et al., arXiv 2106.09685:

    W' = W + scale * alpha / rank * up @ down
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.adapters.lora_config import LoraConfig, read_config
from runtimes.adapters.lora_module_names import name_of, spellings
from runtimes.bundle.safetensors_reader import read_floats, read_header, read_metadata, read_number
from runtimes.errors import InputError

Array = np.ndarray[Any, Any]

# ending of a key -> what it is, in every format that the published files have
_ENDINGS = tuple((re.compile(ending), part) for ending, part in (
    (r"\.lora_A(\.[^.]+)?\.weight$", "down"), (r"\.lora_B(\.[^.]+)?\.weight$", "up"),  # PEFT
    (r"\.lora(_linear_layer)?\.down\.weight$", "down"), (r"\.lora(_linear_layer)?\.up\.weight$", "up"),  # since 0.17
    (r"_lora\.down\.weight$", "down"), (r"_lora\.up\.weight$", "up"),  # up to 0.16: attn1.processor.to_q_lora.down
    (r"\.lora_down\.weight$", "down"), (r"\.lora_up\.weight$", "up"),  # kohya
    (r"\.alpha$", "alpha")))
# kohya's beginning of a key -> diffusers', which is the folder of the network in a pipeline
_KOHYA = {"lora_unet_": "unet.", "lora_te_": "text_encoder.", "lora_te1_": "text_encoder.",
          "lora_te2_": "text_encoder_2."}
# either -> what adapters call the network: `Denoiser.adapter` and `TextEncoder.adapter` of a bundle's roles
NETWORKS = {begin: folder.rstrip(".") for begin, folder in (*_KOHYA.items(), *((f, f) for f in _KOHYA.values()))}
# part of a key -> the kind of adapter that has it
_OTHERS = {"lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "lora_mid": "LoCon's CP decomposition",
           "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "glora": "GLoRA", ".diff": "a difference of whole weights",
           "_norm": "a change of norms", ".bias": "a change of biases", "on_input": "IA3",
           "lora_embedding_": "a change of the table of embeddings", "bundle_emb": "an embedding"}


@dataclass(frozen=True)
class LoraKey:
    """What one key of a file is.

    Attributes:
        network: that it changes, as adapters call it.
        place: path of the changed module, in the file's spelling.
        part: "down", "up" or "alpha".
    """

    network: str
    place: str
    part: str


def read_keys(file: Path) -> dict[str, LoraKey]:
    """Every key of a LoRA file, from its header alone.

    Raises:
        InputError: not a safetensors file, or a key of no known format, which is named.
    """
    if file.suffix != ".safetensors":
        raise InputError("a LoRA must be a .safetensors file; pickles can run code when they are read: refused",
                         where=str(file), fix="convert it where you trust it")
    if not file.is_file():
        raise InputError("no such file", where=str(file), fix="give a LoRA file")
    found = {}
    for key in read_header(file):
        prefix = next((p for p in NETWORKS if key.startswith(p)), None)
        ending = next(((match, part) for match, part in ((e.search(key), part) for e, part in _ENDINGS) if match), None)
        if prefix is None or ending is None:
            raise InputError(f"{key} is not a key of a LoRA that can be merged{_reason(key, prefix)}", where=str(file),
                             fix="use a LoRA in diffusers', PEFT's or kohya's format (no DoRA, LoHa or LoKr)")
        match, part = ending
        found[key] = LoraKey(NETWORKS[prefix], key[len(prefix) : match.start()], part)
    if not found:
        raise InputError("it holds no weights", where=str(file))
    return found


def _reason(key: str, prefix: str | None) -> str:
    kind = next((f": it is {kind}" for part, kind in _OTHERS.items() if part in key), "")
    return kind or ("" if prefix else ": it names no component, as unet., text_encoder. or lora_unet_ would")


def networks_of(file: Path) -> tuple[str, ...]:
    """Networks that a LoRA file changes, as adapters call them.

    Raises:
        InputError: as `read_keys`.
    """
    return tuple(sorted({key.network for key in read_keys(file).values()}))


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to the weight of one module: up @ down.

    Attributes:
        key: of the file, for errors.
        down: (rank, in) or, of a convolution, (rank, in, height, width) float32.
        up: (out, rank) float32; scale, alpha and rank are in it.
    """

    key: str
    down: Array
    up: Array

    def delta(self, shape: tuple[int, ...], where: str) -> Array:
        """up @ down in the shape of the weight, (out, in) or a convolution's (out, in, height, width), float32.

        Raises:
            InputError: it does not fit, or is not finite.
        """
        product = (self.up.shape[0], *self.down.shape[1:])
        if self.up.shape[1] != self.down.shape[0] or _without_ones(product) != _without_ones(shape):
            raise InputError(f"{self.key} is {self.up.shape} x {self.down.shape}, which does not fit {shape}",
                             where=where, fix="use a LoRA that was trained for this architecture")
        found: Array = (self.up @ self.down.reshape(len(self.down), -1)).reshape(shape)
        if not np.isfinite(found).all():
            raise InputError(f"{self.key} holds NaN or infinity", where=where, fix="get the file again")
        return found


def parse_lora(option: str) -> tuple[Path, float]:
    """Read `FILE[:SCALE]`.

    Raises:
        InputError: the scale is not a finite number.
    """
    name, colon, text = option.rpartition(":")
    if not colon or text.endswith(".safetensors"):
        return Path(option), 1.0
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not abs(scale) < float("inf"):
        raise InputError(f"the scale {text!r} is not a number", where=f"--lora {option}", fix="write FILE:0.8")
    return Path(name), scale


def read_factors(file: Path, network: str, scale: float, modules: Iterable[str], levels: Any) -> dict[str, Factors]:
    """A file's part for one network, by the name of the module that it changes.

    The scale of a module is alpha / rank by the file's own alphas or PEFT's config, 1 where neither is there.

    Args:
        file: the LoRA.
        network: as adapters call it, see `NETWORKS`.
        scale: how much of it.
        modules: names of the network's modules that have a matrix.
        levels: the network's `layers_per_block`, by which kohya counts.

    Raises:
        InputError: as `read_keys` and `read_config`; a key that fits nothing in the network; two keys for one thing;
            half a pair or an alpha alone; a rank other than stated; a text encoder's module that the metadata leaves
            out. The keys are named.
    """
    modules = list(modules)
    header, metadata = read_header(file), read_metadata(file)
    config = read_config(metadata, network, file)
    found = {}
    for name, keys in _by_module(file, network, spellings(modules), levels).items():
        if missing := {"down", "up"} - keys.keys():
            first = keys.get("down") or keys.get("up") or keys["alpha"]
            lacks = "lacks its other half" if len(missing) == 1 else "has no weights beside it"
            raise InputError(f"{first} {lacks}", where=str(file), fix="get the file again")
        down, up = (read_floats(file, header, keys[part]) for part in ("down", "up"))
        if not config.names(name):
            raise InputError(f"{keys['down']} is of a module that the metadata leaves out: diffusers would too",
                             where=str(file), fix=f"take the key out, or name the module in {network}.target_modules")
        if min(down.ndim, up.ndim) < 2 or not down.size or not up.size:
            raise InputError(f"{keys['down']} is {up.shape} x {down.shape}, which are not matrices", where=str(file),
                             fix="get the file again")
        own = scale * _module_scale(file, header, keys, name, len(down), config)
        found[name] = Factors(keys["down"], down, np.float32(own) * up.reshape(len(up), -1))
    if found:
        config.say_unused(modules, network, file)
    return found


def _by_module(file: Path, network: str, names: Mapping[str, str], levels: Any) -> dict[str, dict[str, str]]:
    """Module -> part -> key of the file."""
    groups: dict[str, dict[str, str]] = {}
    for key, found in sorted(read_keys(file).items(), key=lambda item: (item[1].part == "alpha", item[0])):
        if found.network != network:
            continue
        name = name_of(found.place, names, levels)
        if name is None:
            raise InputError(f"{key} fits nothing in the {network}", where=str(file),
                             fix="use a LoRA that was trained for this architecture")
        group = groups.setdefault(name, {})
        if found.part in group:
            raise InputError(f"{group[found.part]} and {key} both change {name}", where=str(file),
                             fix="take one of the two out of the file")
        group[found.part] = key
    return groups


def _module_scale(
    file: Path, header: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], name: str, rank: int,
    config: LoraConfig,
) -> float:
    if config.stated and config.rank_of(name) != rank:
        raise InputError(f"{keys['down']} is of rank {rank}, its metadata says {config.rank_of(name):g}",
                         where=str(file), fix="get the file again")
    if "alpha" not in keys:
        return config.scale_of(name)
    if config.stated:
        raise InputError(f"{keys['alpha']} is stated a second time by the metadata", where=str(file),
                         fix="take one of the two out of the file")
    alpha = read_number(file, header, keys["alpha"])
    if not math.isfinite(alpha):
        raise InputError(f"{keys['alpha']} is {alpha}", where=str(file), fix="get the file again")
    return alpha / rank


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the sizes of 1 at its end: a convolution of one pixel is a matrix."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
