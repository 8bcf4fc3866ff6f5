"""Reads PEFT's config from a LoRA file's metadata, where diffusers puts it: the rank and the scale of each module."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.errors import InputError

METADATA = "lora_adapter_metadata"
_DEFAULT = 8  # of r and of lora_alpha, peft/tuners/lora/config.py
# Keys that say how it was trained, and _TARGETS, which modules it has: the tensors say that themselves, and diffusers
# goes by them in a U-Net. In a text encoder it leaves out, without a word, what the keys do not name.
_HARMLESS = frozenset("""
    peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version lora_dropout bias
    fan_in_fan_out megatron_core loftq_config eva_config corda_config lora_ga_config runtime_config
    qalora_group_size ensure_weight_tying
    """.split())
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_HONOURED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", *_TARGETS})
# Initialisations that leave the model's own weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraConfig:
    """What a file states for one component.

    Attributes:
        stated: whether it states anything; without, every scale is 1.
        rank: of modules that no pattern fits.
        alpha: of modules that no pattern fits.
        rank_pattern: regular expression -> rank; the first that fits counts.
        alpha_pattern: regular expression -> alpha.
        stabilised: scale alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732) instead of alpha / rank.
        targets: of a text encoder, the keys by which PEFT chooses modules.
    """

    stated: bool = False
    rank: float = _DEFAULT
    alpha: float = _DEFAULT
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False
    targets: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> float:
        """The rank stated for a module."""
        return self.rank_pattern.get(_fitting(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / rank of a module, or what `stabilised` says; 1 where nothing is stated."""
        if not self.stated:
            return 1.0
        alpha, rank = self.alpha_pattern.get(_fitting(self.alpha_pattern, module), self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def names(self, module: str) -> bool:
        """Whether PEFT would give a text encoder's module, in either spelling, a LoRA; of other networks always.

        `check_target_module_exists` (peft/tuners/tuners_utils.py).
        """
        wanted = self.targets.get("target_modules")
        if wanted is None or wanted == "all-linear":
            return True
        excluded = self.targets.get("exclude_modules") or ()
        return any(_chosen(wanted, name) and not _chosen(excluded, name) and self._of_layers(name)
                   for name in _spelled(module))

    def _of_layers(self, module: str) -> bool:
        layers, patterns = self.targets.get("layers_to_transform"), self.targets.get("layers_pattern") or r"[^.]*"
        if layers is None or layers == [] or isinstance(self.targets["target_modules"], str):
            return True
        found = [match for pattern in ([patterns] if isinstance(patterns, str) else patterns)
                 if (match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module))]
        return bool(found) and int(found[0][1]) in ([layers] if isinstance(layers, int) else layers)

    def say_unused(self, modules: Iterable[str], component: str, file: Path) -> None:
        """Log the patterns that fit no module of the network, which PEFT ignores silently."""
        names = list(modules)
        for kind in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, kind):
                if not any(_fits(pattern, name) for name in names):
                    logger.warning("%s: the key %r of %s fits nothing in the %s and changes nothing",
                                   file.name, pattern, kind, component)


def read_config(metadata: Mapping[str, str], component: str, file: Path) -> LoraConfig:
    """PEFT's config for one component.

    Args:
        metadata: of the file's header.
        component: whose keys begin with its name and a dot.
        file: for errors.

    Raises:
        InputError: malformed, or it asks for something that a merged LoRA cannot do; the key is named.
    """
    where = f"{file}, {METADATA}"
    try:
        whole = json.loads(metadata.get(METADATA) or "{}")
        own = {key.removeprefix(f"{component}."): value for key, value in whole.items()
               if key.startswith(f"{component}.")}
    except (ValueError, AttributeError) as error:
        raise InputError("not a JSON object", where=where, fix="get the file again") from error
    for key, value in own.items():
        if key == "init_lora_weights":
            _refuse(value is not None and value not in _PLAIN_STARTS, component, key, value, where)
        elif key not in _HONOURED | _HARMLESS:
            _refuse(bool(value), component, key, value, where)
    config = LoraConfig(bool(own), _number(own, "r", where), _number(own, "lora_alpha", where),
                        _pattern(own, "rank_pattern", where), _pattern(own, "alpha_pattern", where),
                        bool(own.get("use_rslora")), _targets(own, where) if component.startswith("text") else {})
    if min([config.rank, *config.rank_pattern.values()]) <= 0:
        raise InputError("a rank is not positive", where=where, fix="get the file again")
    return config


def _refuse(unusable: bool, component: str, key: str, value: Any, where: str) -> None:
    if unusable:
        raise InputError(f"{component}.{key} is {json.dumps(value)[:80]}, which is not honoured", where=where,
                         fix="merge this adapter with PEFT, and give the merged model")


def _number(own: Mapping[str, Any], key: str, where: str) -> float:
    value = own.get(key, _DEFAULT)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{key} is {value!r}, expected a number", where=where, fix="get the file again")
    return float(value)


def _pattern(own: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    value = own.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} is {type(value).__name__}, expected an object", where=where, fix="get the file again")
    for pattern in value:
        _compiled(rf"(.*\.)?({pattern})$", pattern, key, where)
    return {pattern: _number(value, pattern, where) for pattern in value}


def _targets(own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that choose modules, each a regular expression, a list, or a number."""
    found = {key: own[key] for key in _TARGETS if own.get(key) is not None}
    for key, value in found.items():
        kind = int if key == "layers_to_transform" else str
        if not isinstance(value, kind) and not (isinstance(value, list) and all(isinstance(v, kind) for v in value)):
            raise InputError(f"{key} is {json.dumps(value)[:80]}, which PEFT does not read", where=where,
                             fix="get the file again")
        for pattern in [value] if isinstance(value, str) else []:
            _compiled(pattern, pattern, key, where)
    return found


def _compiled(expression: str, pattern: str, key: str, where: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise InputError(f"the key {pattern!r} of {key} is no regular expression: {error}", where=where,
                         fix="get the file again") from error


def _chosen(targets: str | Iterable[str], name: str) -> bool:
    """A regular expression fits the whole name; an entry of a list is the name or its end."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _spelled(module: str) -> tuple[str, str]:
    """A text encoder's module as transformers 5 and earlier releases call it."""
    plain = module.removeprefix("text_model.")
    return plain, f"text_model.{plain}"


def _fitting(patterns: Iterable[str], module: str) -> str:
    """PEFT's `get_pattern_key` (peft/utils/other.py), for either spelling of a text encoder's module."""
    return next((pattern for pattern in patterns if _fits(pattern, module)), module)


def _fits(pattern: str, module: str) -> bool:
    names = (module, f"text_model.{module.removeprefix('text_model.')}")
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
