"""What the integers of each layer cost the output, and in which order layers give precision back for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.layers import FLOAT, STATIC, WEIGHT, Layer, find_layers
from calibration.observe import Calls, Feeds, beside, plain_session, probed, relative_l2
from calibration.quantize import rewrite
from calibration.ranges import Range, Scheme

LOW_PRECISIONS = (STATIC, WEIGHT)
# An activation that goes back to float32 costs no bytes but time: counted as this share of its float32 weights.
ACTIVATION_COST = 0.25
Errors = Mapping[str, Mapping[str, float]]


def layer_errors(graph: Path, ranges: Mapping[str, Range], scheme: Scheme, calls: Calls, *, threads: int = 0,
                 tell: Callable[[int, int], None] = lambda done, of: None) -> dict[str, dict[str, float]]:
    """Relative L2 of the outputs with one layer below float32 and all others in it: node -> precision -> error.

    Args:
        graph: float32.
        ranges: of every layer's input, and of its output where the scheme quantizes it.
        scheme: integers of the target.
        calls: recorded inputs, few: every layer sees all of them for each precision.
        tell: told how many of how many layers are done.
    """
    feeds = [dict(call) for call in calls()]
    session = plain_session(graph, threads)
    names = [output.name for output in session.get_outputs()]
    expected = [session.run(names, call) for call in feeds]
    del session
    layers = find_layers(ir.load(graph))
    errors: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="ldm-sensitivity-") as scratch:
        for number, layer in enumerate(layers):
            errors[layer.node] = {}
            for precision in LOW_PRECISIONS:
                model = ir.load(graph)
                assignment = {other.node: precision if other is layer else FLOAT for other in layers}
                rewrite(model, assignment, ranges, scheme)
                session = plain_session(beside(model, graph, Path(scratch)), threads)
                errors[layer.node][precision] = _error(session, names, feeds, expected)
            tell(number + 1, len(layers))
    return errors


def _error(session: Any, names: list[str], feeds: Sequence[Feeds], expected: Sequence[Sequence[Any]]) -> float:
    found = [[relative_l2(a, b) for a, b in zip(outputs, session.run(names, call), strict=True)]
             for call, outputs in zip(feeds, expected, strict=True)]
    return float(np.sqrt(np.mean(np.square(found))))


@dataclass(frozen=True)
class Promotion:
    """One layer's way back to a higher precision.

    Attributes:
        node: of the layer.
        precision: that it gets.
        gain: squared relative error of the output that goes away.
        cost_bytes: what the model grows by, time counted as bytes.
    """

    node: str
    precision: str
    gain: float
    cost_bytes: float


def promotions(layers: Sequence[Layer], errors: Errors) -> list[Promotion]:
    """Every step from integers towards float32, the most error per cost first.

    Errors of layers add up in squares, nearly: each is small against the output and independent of the others. A
    layer's second step never comes before its first: where it gains more per cost, both are taken as one.
    """
    found: list[Promotion] = []
    for layer in layers:
        static, weight = (errors[layer.node][precision] ** 2 for precision in LOW_PRECISIONS)
        time, stored = ACTIVATION_COST * 4 * layer.parameters, 3.0 * layer.parameters
        first, second = max(static - weight, 0.0), weight
        if first / time >= second / stored:
            found += [Promotion(layer.node, WEIGHT, first, time), Promotion(layer.node, FLOAT, second, stored)]
        else:
            found.append(Promotion(layer.node, FLOAT, max(static, weight), time + stored))
    return sorted(found, key=lambda p: (-p.gain / p.cost_bytes, p.node))


def assignment_after(layers: Sequence[Layer], path: Sequence[Promotion], count: int, keep: Sequence[str] = (),
                     ) -> dict[str, str]:
    """Precision of every layer after the first `count` promotions of the path; nodes in `keep` are float32."""
    assignment = {layer.node: STATIC for layer in layers}
    assignment.update({p.node: p.precision for p in path[:count]})
    return {**assignment, **dict.fromkeys(keep, FLOAT)}


def fewest(steps: int, holds: Callable[[int], bool]) -> int | None:
    """The least number of promotions for which the budget holds, found by halving; None if not even all do.

    Args:
        steps: number of promotions.
        holds: asked for about log2(steps) numbers. More promotions are taken to be at least as accurate.
    """
    if holds(0):
        return 0
    if not holds(steps):
        return None
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Origin:
    """Where error enters: relative L2 of a layer's input and output against the float32 graph's."""

    node: str
    before: float
    after: float

    @property
    def added(self) -> float:
        """What the layer itself adds, in squares."""
        return float(np.sqrt(max(self.after**2 - self.before**2, 0.0)))

    def __str__(self) -> str:
        return f"{self.node} ({self.before:.2g} -> {self.after:.2g})"


def error_origins(reference: Path, candidate: Path, calls: Calls, *, threads: int = 0) -> list[Origin]:
    """Layers at which the candidate leaves the reference, the one that adds most first.

    Activations are matched by tensor name, which quantization keeps; layers whose tensors are in one graph only are
    left out.
    """
    names = {v.name for node in ir.load(candidate).graph for v in node.outputs}
    layers = [layer for layer in find_layers(ir.load(reference)) if layer.result in names]
    tensors = list(dict.fromkeys(name for layer in layers for name in (layer.source, layer.result)))
    tensors = [name for name in tensors if name in names or name in {v.name for v in ir.load(reference).graph.inputs}]
    squares: dict[str, list[float]] = {name: [] for name in tensors}
    with probed(reference, tensors, threads) as expected, probed(candidate, tensors, threads) as found:
        for feeds in calls():
            a, b = expected(feeds), found(feeds)
            for name in tensors:
                squares[name].append(relative_l2(a[name], b[name]) ** 2)
    errors = {name: float(np.sqrt(np.mean(values))) for name, values in squares.items()}
    origins = [Origin(layer.node, errors.get(layer.source, 0.0), errors[layer.result]) for layer in layers]
    return sorted(origins, key=lambda origin: -origin.added)
