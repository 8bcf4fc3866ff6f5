"""Quantizes one graph by one recipe, to compute in integers or only to store weights in them, and measures the loss."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.choice.layer_sensitivity import Relief, relieve
from calibration.choice.quantization_noise import LayerNoise
from calibration.graphs.layers import assign, find_layers
from calibration.graphs.qdq_placement import quantize, tensors_to_observe
from calibration.graphs.text_encoder_int4 import BlockForm, find_stored, quantize_int4
from calibration.graphs.transforms import ALPHA, channel_means, prepare
from calibration.integers.int4_blocks import GROUP
from calibration.integers.ranges import Range, Scheme, drift, estimate
from calibration.targets_and_recipes import INT4, NEEDS_RANGES
from calibration.trajectory.inner_tensors import compare, observe
from calibration.trajectory.recorder import Recording
from runtimes.bundle.manifest import digest_of
from runtimes.bundle.roles import Role

AUTOENCODER = (Role.IMAGE_ENCODER, Role.IMAGE_DECODER)
NOISE_CALLS = 6  # that say which layers add most of the error, and how much is left


@dataclass(frozen=True)
class Settings:
    """How every graph of one build is quantized.

    Attributes:
        scheme: integers of the target.
        estimator: from what was observed to a range, of `calibration.integers.ranges`.
        methods: what is done to lose less, of `calibration.graphs.transforms.METHODS`.
        keep: patterns of layers that stay in float32.
        smoothquant_alpha: of the method smoothquant.
        blocks: how 4-bit weights are written, fields of `BlockForm`.
        relative_l2: of a component's outputs, what the budget allows.
    """

    scheme: Scheme
    estimator: str = "mse"
    methods: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    smoothquant_alpha: float = ALPHA
    blocks: Mapping[str, Any] | None = None
    relative_l2: float = float("inf")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Those of the config that the pass `quantize` planned."""
        return cls(Scheme(**config["scheme"]), config["estimator"], tuple(config["methods"]), tuple(config["keep"]),
                   config.get("smoothquant_alpha", ALPHA), config.get("blocks"), config["relative_l2"])


@dataclass(frozen=True)
class Quantized:
    """What became of one graph.

    Attributes:
        summary: for the manifest, JSON-able.
        layers: precision, range and error of each layer, for the file beside the graph, JSON-able.
        relative_l2: of the outputs on the recorded calls, the largest; 0 where there are none.
    """

    summary: dict[str, Any]
    layers: dict[str, Any]
    relative_l2: float = 0.0


def quantize_by_recipe(graph: Path, destination: Path, recipe: str, settings: Settings, name: str, role: Role,
                       recording: Recording | None) -> Quantized:
    """Quantize one component by its recipe, or by another where that does not fit: what and why is in the summary.

    Args:
        graph: float32, one component's.
        destination: the graph to write.
        recipe: of `calibration.graphs.layers.RECIPES`.
        settings: of the build.
        name, role: of the component.
        recording: of the whole pipeline; None where no recipe needs one.
    """
    if recipe not in NEEDS_RANGES:
        return quantize_graph(graph, destination, recipe, settings, name, None)
    if recording is None or next(recording.calls(name), None) is None:
        return _stored_only(graph, destination, settings, name,
                            f"{recipe}: the pipeline does not call it while calibrating")
    found = quantize_graph(graph, destination, recipe, settings, name, recording)
    if role in AUTOENCODER and found.relative_l2 > settings.relative_l2 / 2:
        # Its error goes into the image directly; half of the budget is left for the latents'.
        return _stored_only(graph, destination, settings, name,
                            f"{recipe}, whose relative L2 was {found.relative_l2:.2g}")
    return found


def _stored_only(graph: Path, destination: Path, settings: Settings, name: str, instead_of: str) -> Quantized:
    found = quantize_graph(graph, destination, "weight-only", settings, name, None)
    return replace(found, summary={**found.summary, "instead_of": instead_of})


def quantize_graph(graph: Path, destination: Path, recipe: str, settings: Settings, name: str,
                   recording: Recording | None) -> Quantized:
    """Quantize one graph by one recipe.

    Args:
        graph, destination, recipe, settings, name: as of `quantize_by_recipe`.
        recording: whose calls of this component give the ranges of activations; None where only weights are stored.
    """
    if recipe == INT4:
        return _in_4_bits(graph, destination, settings)
    if recording is not None:
        return _with_ranges(graph, destination, recipe, settings, name, recording)
    assignment = assign(find_layers(ir.load(graph)), recipe, settings.keep)
    report = quantize(graph, destination, assignment, {}, settings.scheme).to_json()
    layers = {"precision_map": report.pop("precision_map")}
    return Quantized({"recipe": recipe, "scheme": asdict(settings.scheme), **report}, layers)


def _in_4_bits(graph: Path, destination: Path, settings: Settings) -> Quantized:
    """Store a text encoder's products in 4 bits and its embeddings in 8."""
    blocks = settings.blocks or {}
    form = BlockForm(**blocks)
    assignment = assign(find_stored(ir.load(graph), form), INT4, settings.keep)
    report = quantize_int4(graph, destination, assignment, form, settings.scheme).to_json()
    layers = {"precision_map": report.pop("precision_map")}
    return Quantized({"recipe": INT4, "scheme": asdict(settings.scheme), **report,
                      "blocks": {"bits": 4, "inputs": GROUP, **blocks}}, layers)


def _with_ranges(original: Path, destination: Path, recipe: str, settings: Settings, name: str,
                 recording: Recording) -> Quantized:
    """Activations in integers, too; of the hybrid recipe, those layers that add most of the error are relieved."""
    with tempfile.TemporaryDirectory(prefix="ldm-quantize-") as scratch:
        graph = prepare(original, settings.methods, lambda: recording.calls(name), Path(scratch) / original.name,
                        settings.smoothquant_alpha)
        assignment = assign(find_layers(ir.load(graph)), recipe, settings.keep)
        ranges, layers = find_ranges(graph, assignment, settings, name, recording)
        summary: dict[str, Any] = {"recipe": recipe, **origin_of(settings, recording, layers)}
        if recipe == "hybrid":
            relief = relieved(graph, assignment, ranges, settings.scheme, name, recording)
            summary["relief"] = {"promoted": relief.promoted, "trials": relief.trials,
                                 "relative_l2": [float(f"{error:.4g}") for error in relief.errors]}
            assignment, layers["errors"] = relief.assignment, rounded_errors(relief.noise)
        means = bias_means(graph, assignment, settings, name, recording)
        report = quantize(graph, destination, assignment, ranges, settings.scheme, means).to_json()
    layers["precision_map"] = report.pop("precision_map")
    lost = compare(original, destination, lambda: recording.calls(name))
    return Quantized({**summary, **report}, layers, lost)


def origin_of(settings: Settings, recording: Recording, layers: Mapping[str, Any]) -> dict[str, Any]:
    """From what and how the ranges of a graph were found, as JSON."""
    return {"scheme": asdict(settings.scheme), "estimator": settings.estimator, "recording": recording.identity,
            "methods": list(settings.methods), "ranges_sha256": digest_of(layers["ranges"])}


def bias_means(graph: Path, assignment: Mapping[str, str], settings: Settings, name: str,
               recording: Recording) -> dict[str, Any]:
    """Means that biases are corrected by, tensor -> (C,) float32; none where the method was not chosen."""
    if "bias-correction" not in settings.methods:
        return {}
    return channel_means(graph, assignment, lambda: recording.calls(name))


def relieved(graph: Path, assignment: dict[str, str], ranges: Mapping[str, Range], scheme: Scheme, name: str,
             recording: Recording) -> Relief:
    """The assignment without the layers that add most of the output's error, and what that was worth."""
    calls = recording.spread(name, NOISE_CALLS)
    return relieve(graph, assignment, ranges, scheme, lambda: calls)


def rounded_errors(noise: Mapping[str, LayerNoise]) -> dict[str, dict[str, float]]:
    """Node -> precision -> what the layer was predicted to cost in it, as JSON."""
    return {node: {precision: float(f"{error:.4g}") for precision, error in entry.errors.items()}
            for node, entry in sorted(noise.items())}


def find_ranges(graph: Path, assignment: Mapping[str, str], settings: Settings, name: str, recording: Recording,
                ) -> tuple[dict[str, Range], dict[str, Any]]:
    """Ranges of every activation that the assignment quantizes; the same rounded, and their drift, as JSON."""
    tensors = tensors_to_observe(ir.load(graph), assignment, settings.scheme)
    seen = observe(graph, tensors, lambda: recording.calls(name), histograms=settings.estimator != "minmax",
                   timestep=recording.timestep)
    ranges = estimate(seen, settings.estimator, settings.scheme)
    rounded = {tensor: [float(f"{end:.6g}") for end in ends] for tensor, ends in sorted(ranges.items())}
    return ranges, {"ranges": rounded, "drift": drift(seen)}
