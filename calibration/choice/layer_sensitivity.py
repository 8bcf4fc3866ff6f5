"""Decides which layers return to a higher precision for accuracy, and finds the layers at which an error begins."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.choice.quantization_noise import LayerNoise, predict_noise
from calibration.graphs.layers import FLOAT, STATIC, WEIGHT, Layer, find_layers
from calibration.graphs.qdq_placement import rewrite
from calibration.integers.int8 import Integers
from calibration.integers.ranges import Range, Scheme
from calibration.trajectory.inner_tensors import Calls, Feeds, beside, plain_session, probed, relative_l2

# An activation that goes back to float32 costs no bytes but time: all of them cost as much as this share of the bytes.
ACTIVATION_COST = 0.25
# Limits of what `relieve` may give back: `work`, and `growth`.
MOST_WORK, MOST_BYTES = 0.35, 0.02
RELIEVED = 0.5  # share of the error that may be left


@dataclass(frozen=True)
class Promotion:
    """One step of a layer back to a higher precision.

    Attributes:
        node: of the layer.
        precision: that it gets.
        gain: squared relative error of the output that goes away.
        work: share of the layers' time that goes back to float32, taken to lie half in their multiply-accumulates and
            half in their number: a layer in float32 between integers also converts.
        growth: bytes, as a share of all layers' in float32.
    """

    node: str
    precision: str
    gain: float
    work: float
    growth: float

    @property
    def worth(self) -> float:
        """Gain for what it costs, time counted as bytes."""
        return self.gain / max(ACTIVATION_COST * self.work + self.growth, 1e-30)


def promotions(layers: Sequence[Layer], noise: Mapping[str, LayerNoise], start: Mapping[str, str]) -> list[Promotion]:
    """Every step from where each layer starts towards float32, the most error per cost first.

    Errors of layers add up in squares, nearly: each is small against the output and independent of the others. A
    layer's second step never comes before its first: where it gains more per cost, both are taken as one.
    """
    found: list[Promotion] = []
    all_macs = max(sum(noise[layer.node].macs for layer in layers), 1)
    all_parameters = sum(layer.parameters for layer in layers)
    for layer in layers:
        errors = {precision: error**2 for precision, error in noise[layer.node].errors.items()}
        stored = Promotion(layer.node, FLOAT, errors.get(WEIGHT, 0.0), 0.0, 0.75 * layer.parameters / all_parameters)
        if start[layer.node] == WEIGHT:
            found.append(stored)
        if start[layer.node] != STATIC:
            continue
        work = (noise[layer.node].macs / all_macs + 1 / len(layers)) / 2
        first = Promotion(layer.node, WEIGHT, max(errors[STATIC] - errors[WEIGHT], 0.0), work, 0.0)
        if first.worth >= stored.worth:
            found += [first, stored]
        else:
            found.append(Promotion(layer.node, FLOAT, max(errors.values()), work, stored.growth))
    return sorted(found, key=lambda p: (-p.worth, p.node))


def assignment_after(path: Sequence[Promotion], count: int, start: Mapping[str, str]) -> dict[str, str]:
    """Precision of every layer after the first `count` promotions of the path."""
    return {**start, **{p.node: p.precision for p in path[:count]}}


def affordable(path: Sequence[Promotion]) -> list[Promotion]:
    """The promotions that `relieve` may take: what would go beyond its limits is passed over."""
    chosen: list[Promotion] = []
    work = growth = 0.0
    refused: set[str] = set()
    for promotion in path:
        fits = work + promotion.work <= MOST_WORK and growth + promotion.growth <= MOST_BYTES
        if not fits or promotion.node in refused:
            refused.add(promotion.node)  # no second step without the first
            continue
        work, growth = work + promotion.work, growth + promotion.growth
        chosen.append(promotion)
    return chosen


@dataclass(frozen=True)
class Relief:
    """An assignment that loses less.

    Attributes:
        assignment: precision of every layer.
        promoted: node -> precision, of the layers that are in a higher one than at first.
        errors: measured relative L2 of the outputs, root mean square over the calls, before and after.
        trials: graphs that were measured.
        noise: what each layer was predicted to cost, by node.
    """

    assignment: dict[str, str]
    promoted: dict[str, str]
    errors: tuple[float, float]
    trials: int
    noise: Mapping[str, LayerNoise]


def relieve(graph: Path, start: Mapping[str, str], ranges: Mapping[str, Range], scheme: Scheme, calls: Calls, *,
            share: float = RELIEVED, threads: int = 0) -> Relief:
    """Give higher precision to the layers that add most of the output's error, to as few as leave `share` of it.

    Which go first is predicted (`predict_noise`, one graph), how many must is measured by halving: about
    log2(layers) + 2 graphs, each run on the calls. What is left where the limits bind is more than `share`.

    Args:
        graph: float32.
        start: precision of every layer.
        ranges: of `tensors_to_observe`.
        scheme: integers of the target.
        calls: recorded inputs, few.
    """
    layers = find_layers(ir.load(graph))
    feeds = [dict(call) for call in calls()]
    expected = _outputs(graph, feeds, threads)
    errors: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="ldm-relief-") as scratch:
        stored = Integers(Path(scratch))
        noise = predict_noise(graph, start, ranges, scheme, lambda: feeds, threads=threads, stored=stored)
        path = affordable(promotions(layers, noise, start))

        def error_after(count: int) -> float:
            if count not in errors:
                model = ir.load(graph)
                rewrite(model, assignment_after(path, count, start), ranges, scheme, stored)
                found = _outputs(beside(model, graph, stored.folder), feeds, threads)
                pairs = [(a, b) for one, other in zip(expected, found, strict=True)
                         for a, b in zip(one, other, strict=True)]
                errors[count] = float(np.sqrt(np.mean([relative_l2(a, b) ** 2 for a, b in pairs])))
            return errors[count]

        count = fewest(len(path), lambda n: error_after(n) <= share * error_after(0))
        taken = len(path) if count is None else count
        before, after = error_after(0), error_after(taken)
    promoted = {p.node: p.precision for p in path[:taken]}
    return Relief(assignment_after(path, taken, start), promoted, (before, after), len(errors), noise)


def _outputs(file: Path, feeds: Sequence[Feeds], threads: int) -> list[list[Any]]:
    session = plain_session(file, threads)
    names = [output.name for output in session.get_outputs()]
    return [session.run(names, call) for call in feeds]


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
        """The squared relative error that the layer itself adds."""
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
