"""What passes did to a component's file (pruned, quantized, converted), one dataclass for each format: `DETAILS_OF`.

What a network is for is in `roles`. A key of the JSON that is none of these fields is refused when the bundle is
opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

D = TypeVar("D", bound="Details")


@dataclass(frozen=True)
class Sparse:
    """A record of which the JSON leaves out every field that has its default."""


@dataclass(frozen=True, kw_only=True)
class PrunedChannels(Sparse):
    """Channels that a network has less of.

    Attributes:
        method: what a channel's importance was: "taylor", "l1" or "l2".
        before, remaining: channels of each level, before and after.
        removed: share of all channels, 0 to 1.
        heads: attention heads that remain in each level.
        sensitivity: for each level, relative L2 of the output at each width that was tried.
    """

    method: str
    before: tuple[int, ...]
    remaining: tuple[int, ...] = field(metadata={"key": "kept"})
    removed: float
    heads: tuple[int, ...] = ()
    sensitivity: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pruning(Sparse):
    """What pruning took from a network: parameters that it had, channels, and the share of weights that are zero."""

    parameters_before: int
    channels: PrunedChannels | None = None
    zeros: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Distillation after pruning: steps, "cpu" or "cuda", relative L2 of a call before and after."""

    steps: int
    device: str
    relative_l2_before: float
    relative_l2_after: float


@dataclass(frozen=True, kw_only=True)
class LoraInputs:
    """LoRAs that the network takes as inputs.

    Attributes:
        targets: module -> shape of its weight.
        levels: the network's layers_per_block, by which kohya counts.
        rank: of the LoRAs that it was built with, together.
    """

    targets: Mapping[str, tuple[int, ...]]
    levels: int | tuple[int, ...]
    rank: int


@dataclass(frozen=True, kw_only=True)
class Details(Sparse):
    """Of any format.

    Attributes:
        source_component: the folder of the network in the source, as model_index.json names it.
        pruning, recovery: what became of the network before export.
        lora: where the network takes its LoRAs as inputs.
    """

    source_component: str = ""
    pruning: Pruning | None = None
    recovery: Recovery | None = None
    lora: LoraInputs | None = None

    def become(self, kind: type[D], **more: Any) -> D:
        """What is known, and more, as the details of another format; what that one has no field for is left out."""
        names = {f.name for f in dataclasses.fields(kind)}
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names} | more)


@dataclass(frozen=True, kw_only=True)
class SourceDetails(Details):
    """Of a network in a diffusers folder, or of one that is still PyTorch's.

    Attributes:
        library: that has its class: "diffusers" or "transformers".
        takes, gives: what the network calls its inputs and outputs, in their order, where the component calls them
            otherwise.
    """

    library: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """What was folded and fused for a target: places of each fusion, nodes by type before and after, and in all."""

    target: str
    fusions: Mapping[str, int]
    nodes_before: Mapping[str, int]
    nodes_after: Mapping[str, int]
    nodes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Relief:
    """Layers that went back to a higher precision: which, trials, relative L2 before and after."""

    promoted: Mapping[str, str]
    trials: int
    relative_l2: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Quantization(Sparse):
    """How weights and activations became integers.

    Attributes:
        recipe: `calibration.graphs.layers.assign`'s, or "auto".
        scheme: fields of `calibration.integers.ranges.Scheme`.
        layers, parameters: precision -> layers, weights in it.
        weight_bytes: of all weights, before and after.
        blocks: of 4-bit weights: bits, inputs of a block, and fields of `BlockForm`.
        instead_of: the recipe that did not fit, and why.
        estimator, methods, recording, ranges_sha256: how ranges were found, and from what.
        relief: of the hybrid recipe.
        chosen, trials: of the search.
    """

    recipe: str
    scheme: Mapping[str, bool | int]
    layers: Mapping[str, int]
    parameters: Mapping[str, int]
    weight_bytes: tuple[int, ...]
    blocks: Mapping[str, bool | int | str] | None = None
    instead_of: str = ""
    estimator: str = ""
    methods: tuple[str, ...] | None = None
    recording: str = ""
    ranges_sha256: str = ""
    relief: Relief | None = None
    chosen: str = ""
    trials: int | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a graph came to 16 bits: what `exporters.precision.sixteen_bits.PrecisionReport` says."""

    precision: str
    mode: str
    converted: Mapping[str, int]
    float32: Mapping[str, Mapping[str, int]] = field(metadata={"key": "kept_float32"})
    float32_nodes: Mapping[str, tuple[str, ...]] = field(metadata={"key": "kept_nodes"})
    casts: int
    weight_bytes_before: int
    weight_bytes_after: int

    @property
    def computes(self) -> bool:
        """Whether operators run in 16 bits, not only weights are stored in them."""
        return self.mode == "compute"


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """Weights that lie with another component: its name, their file there, what is read from it and what is not."""

    component: str = field(metadata={"key": "with"})
    file: str
    tensors: int
    bytes: int
    own_bytes: int


@dataclass(frozen=True, kw_only=True)
class GraphDetails(Details):
    """Of an ONNX graph.

    Attributes:
        opset: of ONNX.
        macs: multiply-accumulates of one call at its most common sizes.
        optimization, quantization, conversion, shared_weights: what passes did.
        planned_precision, not_fp16: of a component that had to stay in a higher precision, and why.
    """

    opset: int | None = None
    macs: int | None = None
    optimization: Optimization | None = None
    quantization: Quantization | None = None
    conversion: Conversion | None = None
    shared_weights: SharedWeights | None = None
    planned_precision: str = ""
    not_fp16: str = ""


@dataclass(frozen=True, kw_only=True)
class OpenVinoDetails(GraphDetails):
    """Of OpenVINO's own files: the release that wrote them, operations by type."""

    openvino_version: str = ""
    operations: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class BuilderOptions:
    """How a TensorRT engine was built; `exporters.tensorrt.engine_options.EngineOptions` says what each means."""

    builder: str = "tensorrt-rtx"
    capabilities: tuple[str, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = -1
    tf32: bool = False
    version_compatible: bool = False
    hardware: str = "none"
    refittable: bool = False
    stripped: bool = False
    weight_streaming: bool = False
    sparse_weights: bool = False
    tiling: str = "none"
    auxiliary_streams: int = -1
    graph_capturable: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """Q/DQ nodes of the graph that was compiled: operator -> quantized inputs, attention blocks, those not fused."""

    inputs: Mapping[str, int]
    attentions: int
    broken_attentions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineDetails(GraphDetails):
    """Of a TensorRT engine.

    Attributes:
        builder, builder_version: "tensorrt" or "tensorrt-rtx", and its release, which alone loads the engine.
        compute_capabilities: of the GPUs that it runs on; none means that of the build machine.
        refused_capabilities: those that the builder offers but refused for this graph, with its words.
        profiles: for each, input -> smallest, most common and largest shape.
        options: of the builder.
        gpu: of the build machine, "NVIDIA H100, 9.0"; empty for an engine that was built without one.
        engine_layers: of the network, by the type of their result.
        graph_sha256: of the ONNX file that was compiled; compiled_component_sha256 of it with its weights.
        executed, not_executed: whether parity was measured on the engine itself, and if not, why.
        quantizers: of an INT8 engine.
        weights, graph: the ONNX file beside the engine, whose weights it reads when loaded or that is there to look at.
    """

    builder: str
    builder_version: str
    compute_capabilities: tuple[str, ...]
    refused_capabilities: Mapping[str, str]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    options: BuilderOptions
    gpu: str
    engine_layers: Mapping[str, int] = field(metadata={"key": "layers"})
    graph_sha256: str
    compiled_component_sha256: str
    executed: bool
    not_executed: str = ""
    quantizers: Quantizers | None = None
    weights: str = ""
    graph: str = ""


DETAILS_OF: dict[str, type[Details]] = {
    "diffusers": SourceDetails,
    "safetensors": SourceDetails,
    "onnx": GraphDetails,
    "openvino": OpenVinoDetails,
    "tensorrt": EngineDetails,
}
