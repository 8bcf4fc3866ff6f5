"""Assignments of precisions that a search tries on one network: from all layers in integers to ever more in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.choice.layer_sensitivity import assignment_after, promotions
from calibration.choice.quantization_noise import predict_noise
from calibration.graphs.layers import assign, find_layers
from calibration.graphs.qdq_placement import quantize
from calibration.graphs.transforms import prepare
from calibration.recipes.one_graph import (
    NOISE_CALLS,
    Quantized,
    Settings,
    bias_means,
    find_ranges,
    origin_of,
    relieved,
    rounded_errors,
)
from calibration.targets_and_recipes import SEARCHED
from calibration.trajectory.recorder import Recording


@dataclass(frozen=True)
class Candidate:
    """One assignment, written.

    Attributes:
        name: "hybrid", or the number of promotions.
        file: its graph.
        assignment: layer -> precision.
        report: of what was written, JSON-able.
    """

    name: str
    file: Path
    assignment: Mapping[str, str]
    report: Mapping[str, Any]


class Candidates:
    """Every layer begins in integers. What each costs the output is predicted (`quantization_noise`); layers then go
    back to float32, the most error for the least bytes and time first. The hybrid recipe is a candidate too.

    Args:
        graph: float32.
        settings: of the build.
        name: of the component.
        recording: its calls give ranges and predictions.
        folder: empty; receives the graphs.
    """

    def __init__(self, graph: Path, settings: Settings, name: str, recording: Recording, folder: Path) -> None:
        self._settings, self._name, self._recording, self._folder = settings, name, recording, folder
        self._graph = prepare(graph, settings.methods, lambda: recording.calls(name), folder / "prepared.onnx",
                              settings.smoothquant_alpha)
        self._layers = find_layers(ir.load(self._graph))
        self._start = assign(self._layers, "static", settings.keep)
        self._ranges, self._observed = find_ranges(self._graph, self._start, settings, name, recording)
        calls = recording.spread(name, NOISE_CALLS)
        self._noise = predict_noise(self._graph, self._start, self._ranges, settings.scheme, lambda: calls)
        self._path = promotions(self._layers, self._noise, self._start)
        self._means = bias_means(self._graph, self._start, settings, name, recording)

    @property
    def most_promotions(self) -> int:
        """How many layers can be given back a precision, one after the other."""
        return len(self._path)

    def hybrid(self) -> Candidate:
        """That of the hybrid recipe, relieved as it always is."""
        assignment = assign(self._layers, "hybrid", self._settings.keep)
        relief = relieved(self._graph, assignment, self._ranges, self._settings.scheme, self._name, self._recording)
        return self._write("hybrid", "hybrid", relief.assignment)

    def promoted(self, count: int) -> Candidate:
        """That of the first `count` promotions."""
        return self._write(f"{count} promotions", str(count), assignment_after(self._path, count, self._start))

    def described(self, chosen: Candidate, trials: int) -> Quantized:
        """What the manifest and the file of layers say of the one that was chosen.

        Args:
            chosen: of these candidates.
            trials: how many were tried.
        """
        report = {key: value for key, value in chosen.report.items() if key != "precision_map"}
        summary = {"recipe": SEARCHED, **origin_of(self._settings, self._recording, self._observed),
                   "chosen": chosen.name, "trials": trials, **report}
        return Quantized(summary, {**self._observed, "precision_map": dict(sorted(chosen.assignment.items())),
                                   "errors": rounded_errors(self._noise)})

    def _write(self, name: str, folder: str, assignment: Mapping[str, str]) -> Candidate:
        file = self._folder / folder / "model.onnx"
        file.parent.mkdir(exist_ok=True)
        report = quantize(self._graph, file, assignment, self._ranges, self._settings.scheme, self._means).to_json()
        return Candidate(name, file, assignment, report)
