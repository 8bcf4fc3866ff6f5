"""Level *weights*: compares every tensor that diffusers and PEFT would run, adapters included, with ours, one by one.

diffusers loads each network by its own loader, memory-mapped; LoRAs are loaded by `load_lora_weights` on a pipeline
without weights, so that PEFT says what it would add to which (`get_delta_weight`), and embeddings by
`load_textual_inversion`. Ours are the tensors of the source bundle, from which everything that follows is made.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from deploy.parity.upstream.asked_model import Upstream
from deploy.parity.upstream.diffusers_loading import (
    CannotLoadError,
    load_loras,
    load_pipeline,
    load_safety_checker,
    load_words,
    loader_faults,
    network_of,
    part_of,
    source_of,
)
from exporters.adapters.lora_merging import levels_of, matrices_of
from exporters.source.networks import empty_module
from runtimes.adapters.lora_files import Factors, networks_of, read_factors
from runtimes.adapters.lora_inputs import own_file
from runtimes.bundle.folder import Bundle
from runtimes.bundle.safetensors_reader import read_header
from runtimes.codec.safety_checker import SAFETY_CHECKER

# Merging adds in another order than PEFT does: some units in the last place of the largest weight.
ROUNDING = 1e-5
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 3
_MADV_DONTNEED = 4  # of Linux, which Python has for its own mappings only


@dataclass
class WeightsReport:
    """What was compared.

    Attributes:
        tensors, bytes: of all networks, as diffusers has them.
        adapted: tensors that an adapter changes.
        max_abs: largest difference of one number.
        different: network, tensor and what differs, of each that does.
        unverified: why something could not be compared, one sentence each.
    """

    tensors: int = 0
    bytes: int = 0
    adapted: int = 0
    max_abs: float = 0.0
    different: list[tuple[str, str, str]] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)


def compare_weights(upstream: Upstream, source: Bundle) -> WeightsReport:
    """Compare every network of a source bundle with what diffusers loads.

    Args:
        upstream: the model as its user has it.
        source: the same model after the passes `load` and `adapters`.
    """
    report, seen = WeightsReport(), set[str]()
    for name, component in source.manifest.components.items():
        part = part_of(component)
        if part not in seen:  # else the other half of an autoencoder, or another entry of a U-Net
            seen.add(part)
            _compare_network(report, upstream, source, name)
    return report


def _compare_network(report: WeightsReport, upstream: Upstream, source: Bundle, name: str) -> None:
    part = part_of(source.component(name))
    try:
        dtype = _stored_dtype(upstream, part)
        if part == SAFETY_CHECKER:  # a part of the pipeline that judges images, which no request here has it do
            theirs = load_safety_checker(upstream, dtype)
        else:
            pipe = load_pipeline(upstream, "text", {}, read=[part], dtype=dtype)
            theirs = getattr(pipe, part)
        reader = source.manifest.pipeline.text_encoder(name)
        if upstream.embeddings and reader is not None:
            load_words(upstream, source, pipe, reader, theirs)
    except CannotLoadError as error:
        report.unverified.append(f"{part}: diffusers does not load it: {error}")
        return
    try:
        deltas = _deltas(upstream, source, part)
    except CannotLoadError as error:
        report.unverified.append(f"{part}: diffusers does not load the LoRAs: {error}")
        return
    ours, state, rows = _Ours(source, name), theirs.state_dict(), _table(theirs)
    adapted = ours.adapted(upstream)
    passed_over = sorted(adapted - set(deltas))
    if passed_over:
        report.unverified.append(f"{part}: diffusers passes over {len(passed_over)} weights that the LoRAs name, "
                                 f"{', '.join(passed_over[:SHOWN])} among them")
    if adapted and (faults := loader_faults(upstream)):
        report.unverified += [f"{part}: {fault}" for fault in faults]
        passed_over, deltas = sorted(adapted), {}
    if extra := sorted(set(ours.names) ^ set(state)):
        report.different.append((part, extra[0], f"only {'ours' if extra[0] in ours.names else 'diffusers'} has it"))
    mapped = _file_mappings()
    for key in (key for key in state if key in ours.names and key not in passed_over):
        tensor, delta = state[key], deltas.pop(key, None)
        found = ours.tensor(key)
        if key == rows:  # a table may be longer than the vocabulary that a tokenizer reaches
            found, tensor = found[: len(tensor)], tensor[: len(found)]
        _compare_tensor(report, part, key, tensor, delta, found)
        _let_go(state[key], mapped)
    report.different += [(part, key, "PEFT adds to it, and we have no such weight") for key in deltas]


def _compare_tensor(report: WeightsReport, part: str, key: str, tensor: Any, delta: Any, found: Any) -> None:
    report.tensors, report.bytes = report.tensors + 1, report.bytes + tensor.numel() * tensor.element_size()
    if tensor.shape != found.shape:
        report.different.append((part, key, f"ours is {tuple(found.shape)}, diffusers' {tuple(tensor.shape)}"))
    elif delta is None and tensor.dtype == found.dtype and torch.equal(tensor, found):
        return
    else:
        expected = tensor.double() if delta is None else tensor.double() + delta.double().reshape(tensor.shape)
        report.adapted += delta is not None
        error, largest = (float(v) for v in ((expected - found).abs().max(), expected.abs().max()))
        report.max_abs = max(report.max_abs, error)
        if not error <= (ROUNDING * largest if delta is not None else 0):
            what = f"differs by up to {error:.3g} of {largest:.3g}"
            if delta is not None:
                adds = float((found - tensor).abs().max())
                what += f"; PEFT adds up to {float(delta.abs().max()):.3g}, we {adds:.3g}"
            report.different.append((part, key, what))


class _Ours:
    """The tensors of one network of a source bundle by the network's own names, each read when asked for."""

    def __init__(self, source: Bundle, name: str) -> None:
        network = network_of(source, name)
        self._adapter = network.adapter
        module, self._places = empty_module(network.folder, network.library, network.class_name)
        state = module.state_dict()
        self._shapes = {key: tensor.shape for key, tensor in state.items()}
        tied: Mapping[str, str] = getattr(module, "_tied_weights_keys", None) or {}
        self._tied = {key: other for key, other in dict(tied).items() if key in state and key not in self._places}
        self.names = frozenset(self._places) | frozenset(self._tied)
        self._modules = matrices_of(module), levels_of(module)
        beside = source.component(name).details.lora is not None
        self._beside: Mapping[str, Factors] = self._factors(source.file(own_file(name)), 1.0) if beside else {}

    def _factors(self, file: Path, scale: float) -> dict[str, Factors]:
        return read_factors(file, self._adapter, scale, *self._modules)

    def adapted(self, upstream: Upstream) -> set[str]:
        """The tensors that we change, by the LoRAs' names."""
        return {f"{place}.weight" for file, scale in upstream.loras if self._adapter in networks_of(file)
                for place in self._factors(file, scale)}

    def tensor(self, key: str) -> Any:
        """One tensor as it is stored, a LoRA that lies beside the weights added; float32 where it is converted."""
        place = self._places[self._tied.get(key, key)]
        with safe_open(place.file, framework="pt", device="cpu") as tensors:  # anew: its end unmaps what was read
            found = tensors.get_tensor(place.key).reshape(self._shapes[key])
        factors = self._beside.get(key.removesuffix(".weight"))
        if factors is None:
            return found
        return found.float() + torch.from_numpy(factors.delta(tuple(found.shape), key))


def _deltas(upstream: Upstream, source: Bundle, part: str) -> dict[str, Any]:
    """What PEFT adds to which weight of a network; the weights themselves are never read nor given memory.

    Raises:
        CannotLoadError: diffusers or PEFT refuses a LoRA.
    """
    if not upstream.loras:
        return {}
    # Not on the meta device, where PEFT would put its own weights too.
    unread = {part_of(c): network_of(source, name).unread() for name, c in source.manifest.components.items()}
    pipe = load_pipeline(upstream, "text", unread)
    load_loras(upstream, pipe)
    found: dict[str, Any] = {}
    for place, layer in getattr(pipe, part).named_modules():
        for adapter in getattr(layer, "active_adapters", ()) if hasattr(layer, "lora_A") else ():
            if adapter in layer.lora_A:
                delta = layer.get_delta_weight(adapter).detach().float()
                found[f"{place}.weight"] = found.get(f"{place}.weight", 0) + delta
    return found


def _stored_dtype(upstream: Upstream, part: str) -> Any:
    """What most numbers of a network are stored in, so that nothing is converted; float32 in doubt."""
    counts: dict[str, int] = {}
    component = source_of(upstream).with_component(part).components[part]
    for file in component.weights:
        for entry in read_header(file).values():
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + int(np.prod(entry["shape"]))
    kinds = [kind for kind in counts if kind in ("F64", "F32", "F16", "BF16")]
    return _DTYPES.get(kinds[0], torch.float32) if len(kinds) == 1 else torch.float32


def _table(module: Any) -> str:
    """Name of the table of a text encoder's embeddings, empty for another network."""
    try:
        table = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    return next((f"{name}.weight" for name, layer in module.named_modules() if layer is table), "")


def _file_mappings() -> list[tuple[int, int]]:
    """First and last address of every part of this process's memory that is a file of weights."""
    found = []
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].strip().endswith(".safetensors"):
                first, last = fields[0].split("-")
                found.append((int(first, 16), int(last, 16)))
    return found


def _let_go(tensor: Any, mapped: list[tuple[int, int]]) -> None:
    """Give back the memory of a mapped tensor that has been looked at; it would be read from its file again."""
    page = 4096
    first = tensor.data_ptr() // page * page + page
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if last > first and any(a <= first and last <= b for a, b in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)

