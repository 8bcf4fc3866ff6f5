"""LoRA files (Hu et al., arXiv 2106.09685) in the formats of diffusers, PEFT and kohya: what they add to which weight.

    W' = W + scale * alpha / rank * up @ down
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import InputError
from runtimes.weights import read_floats, read_header, read_metadata

Array = np.ndarray[Any, Any]

# suffix of a key -> what it is, in every format that the published files have
_SUFFIXES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers 0.17 to 0.25
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # diffusers up to 0.16: attn1.processor.to_q_lora.down
    ".lora_down.weight": "down", ".lora_up.weight": "up",  # kohya
    ".alpha": "alpha",
}
_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
             "lora_te2_": "text_encoder_2", "unet.": "unet", "text_encoder.": "text_encoder",
             "text_encoder_2.": "text_encoder_2"}
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config, as JSON


@dataclass(frozen=True)
class LoraKey:
    """What one key of a file is.

    Attributes:
        component: of the pipeline.
        place: path of the changed module, in the file's spelling.
        part: "down", "up" or "alpha".
    """

    component: str
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
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        prefix = next((p for p in _PREFIXES if key.startswith(p)), None)
        if suffix is None or prefix is None:
            raise InputError(f"{key} is not a key of a LoRA that can be merged", where=str(file),
                             fix="use a LoRA in diffusers', PEFT's or kohya's format (no DoRA, LoHa or LoKr)")
        found[key] = LoraKey(_PREFIXES[prefix], key[len(prefix) : -len(suffix)], _SUFFIXES[suffix])
    if not found:
        raise InputError("it holds no weights", where=str(file))
    return found


def components_of(file: Path) -> tuple[str, ...]:
    """Components that a LoRA file changes.

    Raises:
        InputError: as `read_keys`.
    """
    return tuple(sorted({key.component for key in read_keys(file).values()}))


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
        """up @ down in the shape of the weight, (out, in) or a convolution's (out, in, h, w).

        Raises:
            InputError: it does not fit, or is not finite.
        """
        wide = self.up.shape[1] == self.down.shape[0] and (self.up.shape[0], *self.down.shape[1:])
        if not wide or int(np.prod(wide)) != int(np.prod(shape)) or wide[0] != shape[0]:
            raise InputError(f"{self.key} is {self.up.shape} x {self.down.shape}, which does not fit {shape}",
                             where=where, fix="use a LoRA that was trained for this architecture")
        found: Array = (self.up @ self.down.reshape(len(self.down), -1)).reshape(shape)
        if not np.isfinite(found).all():
            raise InputError(f"{self.key} holds NaN or infinity", where=where, fix="get the file again")
        return found


def parse_lora(option: str) -> tuple[Path, float]:
    """Read `FILE[:SCALE]`.

    Raises:
        InputError: a scale that is no finite number.
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


def read_factors(file: Path, component: str, scale: float, modules: Iterable[str], levels: Any) -> dict[str, Factors]:
    """A file's part for one component, by the name of the module that it changes.

    Args:
        file: the LoRA.
        component: of the pipeline.
        scale: how much of it.
        modules: names of the network's modules that have a matrix.
        levels: the network's `layers_per_block`, by which kohya counts.

    Raises:
        InputError: as `read_keys`; a key that fits nothing in the network, the first one being named; half a pair.
    """
    mine = {key: found for key, found in read_keys(file).items() if found.component == component}
    names, header = _spellings(modules), read_header(file)
    stated = _stated_scales(read_metadata(file), component)
    groups: dict[str, dict[str, Any]] = {}
    for key in sorted(mine):
        name = _named(mine[key].place, names, levels)
        if name is None:
            raise InputError(f"{key} fits nothing in the {component}", where=str(file),
                             fix="use a LoRA that was trained for this architecture")
        groups.setdefault(name, {"key": key})[mine[key].part] = read_floats(file, header, key)
    found: dict[str, Factors] = {}
    for name, group in groups.items():
        down, up = group.get("down"), group.get("up")
        if down is None or up is None:
            raise InputError(f"{group['key']} lacks its other half", where=str(file), fix="get the file again")
        alpha = float(group["alpha"]) / down.shape[0] if "alpha" in group else stated(name)
        found[name] = Factors(group["key"], down, np.float32(scale * alpha) * up.reshape(len(up), -1))
    return found


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """Every spelling that files have of a module -> its name in the network."""
    names = {}
    for name in modules:
        bare = name.removeprefix("text_model.")
        for spelling in (bare, f"text_model.{bare}"):
            names[spelling] = name
            names[spelling.replace(".", "_")] = name
    return names


def _named(place: str, names: Mapping[str, str], layers_per_block: Any) -> str | None:
    """The network's name of a place."""
    old = re.sub(r"\.processor\.to_(q|k|v|out)$", r".to_\1", place)
    candidates = [place, old, f"{old}.0", _from_original(place, layers_per_block)]
    return next((names[c] for c in candidates if c in names), None)


def _from_original(place: str, layers_per_block: Any) -> str:
    """kohya's names of Stable Diffusion XL follow the original U-Net's numbering, `openaimodel.py` of CompVis: in each
    level layers_per_block layers and a change of size, counted through."""
    layers = layers_per_block if isinstance(layers_per_block, int) else 2
    match = re.match(r"(input|output|middle)_blocks?_(\d+)_?(\d+)?_(.*)", place)
    if match is None:
        return place
    kind, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    if kind == "middle":
        whole = f"{inner}_{rest}" if inner is not None else rest
        return f"mid_block_attentions_0_{whole}" if number == 1 else f"mid_block_resnets_{number // 2}_{_resnet(whole)}"
    position = number - 1 if kind == "input" else number
    block, layer = divmod(position, layers + 1)
    side = "down" if kind == "input" else "up"
    if rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    if side == "up" and rest == "conv":
        return f"up_blocks_{block}_upsamplers_0_conv"
    if inner == "1":
        return f"{side}_blocks_{block}_attentions_{layer}_{rest}"
    return f"{side}_blocks_{block}_resnets_{layer}_{_resnet(rest)}"


def _resnet(name: str) -> str:
    for old, new in (("in_layers_2", "conv1"), ("out_layers_3", "conv2"), ("emb_layers_1", "time_emb_proj"),
                     ("skip_connection", "conv_shortcut")):
        name = name.replace(old, new)
    return name


def _stated_scales(metadata: Mapping[str, str], component: str) -> Callable[[str], float]:
    """alpha / rank of each module by PEFT's config in the file's metadata; 1 where nothing is stated."""
    try:
        config = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError:
        config = {}
    own = {key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")}

    def pattern(kind: str, name: str, default: Any) -> Any:
        return next((v for k, v in (own.get(kind) or {}).items() if name == k or name.endswith(f".{k}")), default)

    def scale(name: str) -> float:
        rank = pattern("rank_pattern", name, own.get("r"))
        alpha = pattern("alpha_pattern", name, own.get("lora_alpha"))
        if not rank or alpha is None:
            return 1.0
        return float(alpha / (rank**0.5 if own.get("use_rslora") else rank))

    return scale
