"""Changes of a float32 graph that keep its result and lose less in 8 bits; one more corrects biases after rounding.

    split-skips       convolutions over a concatenation become one per part: each part gets a range of its own
    smoothquant       magnitude moves from the activations behind a LayerNormalization into the weights
    bias-correction   the mean error of rounded convolution weights is taken off their bias
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.graphs.layers import FLOAT, find_layers
from calibration.graphs.qdq_placement import save
from calibration.integers.external_data import array_of
from calibration.trajectory.inner_tensors import Calls, probed

METHODS = ("split-skips", "smoothquant", "bias-correction")
ALPHA = 0.5
Array = NDArray[np.float32]


@dataclass
class Channels:
    """Statistics of one activation tensor for each of its C channels.

    Attributes:
        amax: (C,) float32 largest magnitude.
        total: (C,) float64 sum of the values.
        count: how many values of a channel were summed.
    """

    amax: Array
    total: NDArray[np.float64]
    count: int = 0

    @property
    def mean(self) -> Array:
        """(C,) float32 mean activation of each channel."""
        found: Array = (self.total / max(self.count, 1)).astype(np.float32)
        return found


def channels_of(graph: Path, axes: Mapping[str, int], calls: Calls, threads: int = 0) -> dict[str, Channels]:
    """Statistics of tensors along an axis each, over recorded calls.

    Args:
        graph: ONNX file.
        axes: tensor -> axis of its channels, counted from the front or the back.
        calls: gives the recorded feeds.
    """
    found: dict[str, Channels] = {}
    with probed(graph, list(axes), threads) as run:
        for feeds in calls():
            for name, values in run(feeds).items():
                rows = np.moveaxis(values, axes[name], -1).reshape(-1, values.shape[axes[name]])
                if name not in found:
                    found[name] = Channels(np.zeros(rows.shape[1], np.float32), np.zeros(rows.shape[1]))
                entry = found[name]
                entry.amax = np.maximum(entry.amax, np.abs(rows).max(axis=0))
                entry.total += rows.sum(axis=0, dtype=np.float64)
                entry.count += len(rows)
    return found


def concatenations(model: ir.Model) -> dict[str, list[str]]:
    """Convolution -> the parts of the concatenation that it reads directly."""
    found = {}
    for node in model.graph:
        if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        weight = node.inputs[1]
        if source is None or source.op_type != "Concat" or weight is None or not weight.is_initializer():
            continue
        if source.attributes["axis"].as_int() == 1 and all(v is not None for v in source.inputs):
            found[node.name or ""] = [v.name or "" for v in source.inputs if v is not None]
    return found


def split_skips(model: ir.Model, widths: Mapping[str, int]) -> int:
    """conv(concat(a, b)) -> conv(a) + conv(b), exactly.

    The two halves of a skip connection's concatenation differ in range, and one scale for both wastes bits (the
    shortcut split of Q-Diffusion, Li et al., arXiv 2302.04304, section 4.2).

    Args:
        model: changed in place.
        widths: channels of each part.

    Returns:
        number of convolutions that were split.
    """
    nodes = {node.name: node for node in model.graph}
    chosen = concatenations(model)
    for name, parts in chosen.items():
        node = nodes[name]
        source = node.inputs[0]
        assert source is not None
        concat = source.producer()
        assert concat is not None
        result, total, first = node.outputs[0], None, 0
        name_of_result, result.name = result.name or "", None
        for number, (part, width) in enumerate(zip(concat.inputs, (widths[p] for p in parts), strict=True)):
            weight = _slice(model, node.inputs[1], first, first + width, number)
            inputs = [part, weight, *node.inputs[2:]] if number == 0 else [part, weight]
            attributes = {key: attribute.value for key, attribute in node.attributes.items()}
            piece = ir.node("Conv", inputs, attributes, name=f"{name}/part{number}")
            piece.outputs[0].name, piece.outputs[0].dtype = f"{name_of_result}/part{number}", ir.DataType.FLOAT
            model.graph.insert_before(node, piece)
            first += width
            if total is None:
                total = piece.outputs[0]
                continue
            add = ir.node("Add", [total, piece.outputs[0]], name=f"{name}/sum{number}")
            add.outputs[0].name = f"{name_of_result}/sum{number}"
            add.outputs[0].dtype = ir.DataType.FLOAT
            model.graph.insert_before(node, add)
            total = add.outputs[0]
        assert total is not None
        total.name, total.shape = name_of_result, result.shape
        ir.convenience.replace_all_uses_with(result, total, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    _drop_unused(model)
    return len(chosen)


def smoothable(model: ir.Model) -> dict[str, list[str]]:
    """Output of a LayerNormalization that only products with constant weights read -> those products."""
    layers = {layer.node: layer for layer in find_layers(model)}
    found = {}
    for node in model.graph:
        if node.op_type != "LayerNormalization" or len(node.inputs) < 3 or node.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if readers and all(r.op_type == "MatMul" and r.name in layers for r in readers):
            found[node.outputs[0].name or ""] = [r.name or "" for r in readers]
    return found


def smooth(model: ir.Model, amax: Mapping[str, Array], alpha: float = ALPHA) -> int:
    """Divide each channel behind a LayerNormalization by s and multiply the weights that read it by s, exactly.

    s = amax(x)^alpha / amax(w)^(1 - alpha) (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4).

    Args:
        model: changed in place.
        amax: output of each normalization in `smoothable` -> (C,) float32, largest magnitude seen.
        alpha: 0 leaves the difficulty in the activations, 1 moves all of it into the weights.

    Returns:
        number of normalizations that were changed.
    """
    nodes = {node.name: node for node in model.graph}
    chosen = smoothable(model)
    for name, readers in chosen.items():
        first = nodes[readers[0]].inputs[0]
        assert first is not None
        norm = first.producer()
        assert norm is not None
        weights = [nodes[r].inputs[1] for r in readers]
        largest = np.max([np.abs(_array(w)).max(axis=1) for w in weights], axis=0)
        factor = np.maximum(amax[name], 1e-5) ** alpha / np.maximum(largest, 1e-5) ** (1 - alpha)
        factor = np.maximum(factor, 1e-5).astype(np.float32)
        for index in (1, 2):
            _replace(model, norm, index, partial(_scaled, 1 / factor), "smooth")
        for reader in readers:
            _replace(model, nodes[reader], 1, partial(_scaled, factor[:, None]), "smooth")
    _drop_unused(model)
    return len(chosen)


def channel_means(graph: Path, assignment: Mapping[str, str], calls: Calls) -> dict[str, Array]:
    """Input of each convolution that will be rounded -> (C,) float32 mean activation, for `correct_biases`."""
    sources = [layer.source for layer in find_layers(ir.load(graph))
               if layer.op_type == "Conv" and assignment[layer.node] != FLOAT]
    found = channels_of(graph, dict.fromkeys(sources, 1), calls)
    return {name: entry.mean for name, entry in found.items()}


def prepare(graph: Path, methods: Sequence[str], calls: Calls, destination: Path, alpha: float = ALPHA) -> Path:
    """The graph with the chosen exact changes, or the graph itself if none applies.

    Args:
        graph: float32.
        methods: of `METHODS`; bias-correction comes after rounding and is left to `quantize`.
        calls: recorded inputs.
        destination: where to write.
        alpha: of smoothquant, as of `smooth`.
    """
    model, places = ir.load(graph), 0
    if "split-skips" in methods and (parts := concatenations(model)):
        names = sorted({name for found in parts.values() for name in found})
        widths = {name: len(c.amax) for name, c in channels_of(graph, dict.fromkeys(names, 1), _first(calls)).items()}
        places += split_skips(model, widths)
    if "smoothquant" in methods and (norms := smoothable(model)):
        found = channels_of(graph, dict.fromkeys(norms, -1), calls)
        places += smooth(model, {name: c.amax for name, c in found.items()}, alpha)
    if not places:
        return graph
    save(model, destination)
    return destination


def _first(calls: Calls) -> Calls:
    def one() -> Iterable[dict[str, Any]]:
        return [next(iter(calls()))]

    return one


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return array_of(value.const_value)


def _scaled(factor: Array, array: Array) -> Array:
    return array * factor


def _slice(model: ir.Model, value: ir.Value | None, first: int, last: int, number: int) -> ir.Value:
    """Input channels `first` to `last` of a convolution's weight as an initializer."""
    assert value is not None
    return _derived(model, value, f"part{number}", lambda a: np.ascontiguousarray(a[:, first:last]))


def _replace(model: ir.Model, node: ir.Node, index: int, change: Callable[[Any], Any], suffix: str) -> None:
    value = node.inputs[index]
    assert value is not None
    node.replace_input_with(index, _derived(model, value, suffix, change))


def _derived(model: ir.Model, value: ir.Value, suffix: str, change: Callable[[Any], Any]) -> ir.Value:
    name = f"{value.name}/{suffix}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    array = np.asarray(change(_array(value)), np.float32)
    tensor = ir.tensor(array, name=name)
    made = ir.Value(name=name, shape=ir.Shape(list(array.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(made)
    return made


def _drop_unused(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
