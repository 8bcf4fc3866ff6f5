"""Converts float32 ONNX to 16 bits, to compute in them or only to store weights in them.

Inputs and outputs stay float32. Weights are converted one at a time while the file is written.
`exporters.precision.float32_nodes` decides which nodes stay float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import version_converter

from exporters.onnx.stored_weights import unmap
from exporters.precision.element_types import FLOAT, element_types, signature
from exporters.precision.float32_nodes import FP16_MAX, float32_nodes, is_float, magnitude
from runtimes.bundle.folder import translated_disk_errors
from runtimes.errors import InputError

EXTERNAL_ABOVE_BYTES = 1 << 30
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_OLDEST = {"fp16": 13, "bf16": 22}  # before 22, ONNX defines neither Conv nor Resize for bfloat16
_NUMPY: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_ANY_TYPE = frozenset({"Cast", "Shape", "Size"})  # read a tensor of any type without minding which
STORED_ABOVE_ELEMENTS = 1024  # biases and norms are a thousandth of the bytes: not worth their rounding


@dataclass(frozen=True)
class PrecisionReport:
    """What was converted.

    Attributes:
        precision: "fp16" or "bf16".
        mode: "compute" (operators run in 16 bits) or "storage" (weights are widened to float32 before use).
        converted: operators that now run in 16 bits, per op type; empty for "storage".
        float32: reason -> op type -> number of nodes that stayed float32.
        named: reason -> nodes, for the reasons that depend on this model's weights or on the user.
        casts: Cast nodes inserted.
        weight_bytes_before, weight_bytes_after: of all initializers.
    """

    precision: str
    mode: str
    converted: Mapping[str, int]
    float32: Mapping[str, Mapping[str, int]]
    named: Mapping[str, tuple[str, ...]]
    casts: int
    weight_bytes_before: int
    weight_bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """For the manifest's details."""
        return {"precision": self.precision, "mode": self.mode, "converted": dict(self.converted),
                "kept_float32": {r: dict(c) for r, c in self.float32.items()},
                "kept_nodes": {r: list(n) for r, n in self.named.items()}, "casts": self.casts,
                "weight_bytes_before": self.weight_bytes_before, "weight_bytes_after": self.weight_bytes_after}


def convert_precision(source: Path, destination: Path, precision: str, *, mode: str = "compute",
                      keep: Sequence[str] = (), keep_ends: bool = False) -> PrecisionReport:
    """Convert a graph.

    "compute" gives a graph that is valid under strong typing (TensorRT's rule that both inputs of an operator have
    one type). "storage" halves the file for CPUs, whose 16-bit kernels are missing or slow.

    Args:
        source: float32 graph; external weights are memory-mapped.
        destination: written whole or not at all; external weights above 1 GiB.
        precision: "fp16" or "bf16".
        mode: "compute" or "storage".
        keep: patterns (fnmatch) over node and weight names that stay float32.
        keep_ends: keep the first and last convolutions (conv_in, conv_out).

    Raises:
        InputError: an unknown precision or mode, an opset without 16-bit operators, or a pattern that fits nothing.
    """
    if precision not in LOW or mode not in ("compute", "storage"):
        raise InputError(f"cannot convert to {precision!r} for {mode!r}", where=str(source),
                         fix=f"precision: {', '.join(LOW)}; mode: compute, storage")
    model = load(source, precision if mode == "compute" else "")
    before = _weight_bytes(model)
    rewriter = _Rewriter(model, precision)
    float32: dict[ir.Node, str] = {}
    if mode == "storage":
        oversized = rewriter.store(keep)
        named: dict[str, tuple[str, ...]] = {"weight outside float16 or asked for": oversized} if oversized else {}
        converted: Counter[str] = Counter()
    else:
        float32 = float32_nodes(model, LOW[precision], rewriter.types, keep, keep_ends)
        converted = rewriter.compute(float32)
        named = _named(float32)
    reasons: dict[str, Counter[str]] = {}
    for node, reason in float32.items():
        reasons.setdefault(reason.partition(" (")[0], Counter())[node.op_type] += 1
    common.TopologicalSortPass()(model)
    save(model, destination)
    return PrecisionReport(precision, mode, _ordered(converted), {r: _ordered(c) for r, c in sorted(reasons.items())},
                           named, rewriter.casts, before, _weight_bytes(model))


def load(source: Path, precision: str) -> ir.Model:
    """Read a graph with constants as initializers and functions inlined; raised to the opset that `precision` needs.

    Raises:
        InputError: an opset that is too old.
    """
    model = ir.load(source)
    unmap(model)
    opset = model.opset_imports.get("", 0)
    if opset < _OLDEST["fp16"]:
        raise InputError(f"opset {opset} is too old for 16-bit operators", where=str(source),
                         fix=f"export with opset {_OLDEST['fp16']} or newer")
    if model.functions:
        common.InlinePass()(model)
    if precision and opset < _OLDEST[precision]:
        version_converter.convert_version(model, _OLDEST[precision])
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        common.ShapeInferencePass()(model)  # results of branches and loops follow from no schema
    return model


def save(model: ir.Model, destination: Path) -> None:
    """Write a graph; above 1 GiB its weights go to `<name>.data` beside it.

    Raises:
        UnavailableError: the disk is full.
    """
    external = destination.name + ".data" if _weight_bytes(model) > EXTERNAL_ABOVE_BYTES else None
    if external is None:
        ir.external_data.load_to_model(model)  # else unchanged weights would go on pointing at the source's file
    with translated_disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, destination, external_data=external)


def _weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _named(float32: Mapping[ir.Node, str]) -> dict[str, tuple[str, ...]]:
    """Nodes by name where the reason lies in this model: its constants, or what the user asked for."""
    found: dict[str, list[str]] = {}
    for node, reason in float32.items():
        if reason.startswith(("constant", "asked for", "quantization", "not a standard", "the standard")):
            found.setdefault(reason, []).append(node.name or node.op_type)
    return {reason: tuple(sorted(names)) for reason, names in sorted(found.items())}


class _Rewriter:
    """Rewrites one model in place. Holds the element types and the casts and converted weights made so far."""

    def __init__(self, model: ir.Model, precision: str) -> None:
        self.graph, self.precision, self.low = model.graph, precision, LOW[precision]
        self.opsets = dict(model.opset_imports)
        self.types = element_types(model)
        self.casts = 0
        self._cast: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._weight: dict[ir.Value, ir.Value] = {}

    def compute(self, float32: Mapping[ir.Node, str]) -> Counter[str]:
        """Give every node that is not in `float32` 16-bit inputs and outputs, with casts where the type changes."""
        original = dict(self.types)
        nodes = list(ir.traversal.RecursiveGraphIterator(self.graph))
        converted = [n for n in nodes if n not in float32 and is_float(n, original)]
        outputs = set(self.graph.outputs)
        for node in converted:
            found = signature(node, self.opsets)
            assert found is not None  # a node without a schema stays float32
            if node.op_type == "Cast" and not node.domain:
                node.attributes["to"] = ir.AttrInt64("to", int(self.low))
            for value, place in zip(node.outputs, found.outputs, strict=False):
                if original.get(value) == FLOAT and found.accepts(place, self.low):
                    self.types[value] = self.low
                    value.type = ir.TensorType(self.low)
        chosen = set(converted)
        for node in nodes:
            self._fit_inputs(node, node in chosen, original)
        for index, value in enumerate(self.graph.outputs):
            if value in outputs and original.get(value) == FLOAT and self.types.get(value) == self.low:
                self._widen_output(index, value)
        self._drop_unused_weights()
        return Counter(n.op_type for n in converted)

    def store(self, keep: Sequence[str]) -> tuple[str, ...]:
        """Replace large weights by 16-bit ones that a Cast widens; returns the names of those that do not fit."""
        import fnmatch

        left = []
        for value in list(self.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != FLOAT or tensor.size < STORED_ABOVE_ELEMENTS or not value.uses():
                continue
            asked = any(fnmatch.fnmatchcase(value.name or "", pattern) for pattern in keep)
            if asked or (self.low == ir.DataType.FLOAT16 and magnitude(tensor.numpy()) > FP16_MAX):
                left.append(value.name or "")
                continue
            name, uses, shape = value.name or "", tuple(value.uses()), value.shape
            narrow = self._narrow(value)
            wide = self._new_cast(narrow, FLOAT, f"{name}_wide", shape)
            for use in uses:
                use.node.replace_input_with(use.idx, wide)
        self._drop_unused_weights()
        return tuple(sorted(left))

    def _fit_inputs(self, node: ir.Node, converted: bool, original: Mapping[ir.Value, ir.DataType]) -> None:
        """Cast or convert each float32 input of the original to what the node now takes."""
        if node.op_type in _ANY_TYPE and not node.domain:
            return
        found = signature(node, self.opsets)
        for index, value in enumerate(node.inputs):
            if value is None or original.get(value) != FLOAT:
                continue
            place = found.inputs[index] if found is not None and index < len(found.inputs) else ""
            wanted = self.low if converted and found is not None and found.accepts(place, self.low) else FLOAT
            if self.types[value] != wanted:
                node.replace_input_with(index, self._as(value, wanted))

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.const_value is not None and wanted == self.low and value.is_initializer():
            return self._narrow(value)
        if (value, wanted) not in self._cast:
            suffix = "float" if wanted == FLOAT else self.precision
            self._cast[value, wanted] = self._new_cast(value, wanted, f"{value.name}_as_{suffix}", value.shape)
        return self._cast[value, wanted]

    def _new_cast(self, value: ir.Value, wanted: ir.DataType, name: str, shape: ir.Shape | None) -> ir.Value:
        output = ir.Value(name=name, type=ir.TensorType(wanted), shape=shape)
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(wanted))], outputs=[output], name=f"cast/{name}")
        producer = value.producer()
        if producer is not None and producer.graph is self.graph:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        self.casts += 1
        return output

    def _narrow(self, value: ir.Value) -> ir.Value:
        """The 16-bit copy of a weight, made when the file is written."""
        if value not in self._weight:
            tensor = value.const_value
            assert tensor is not None
            name = f"{value.name}_{self.precision}"
            shape = ir.Shape([int(n) for n in tensor.shape.numpy()])
            lazy = ir.LazyTensor(_converter(tensor, _NUMPY[self.precision], name), self.low, shape, name=name)
            narrow = ir.Value(name=name, type=ir.TensorType(self.low), shape=shape, const_value=lazy)
            self.graph.register_initializer(narrow)
            self._weight[value] = narrow
        return self._weight[value]

    def _widen_output(self, index: int, value: ir.Value) -> None:
        """Keep name and float32 type of a graph output whose node now computes in 16 bits."""
        name = value.name or ""
        value.name = f"{name}_{self.precision}"
        wide = self._new_cast(value, FLOAT, name, value.shape)
        self.graph.outputs[index] = wide

    def _drop_unused_weights(self) -> None:
        outputs = set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs:
                del self.graph.initializers[name]


def _converter(tensor: ir.TensorProtocol, dtype: Any, name: str) -> Callable[[], ir.TensorProtocol]:
    def convert() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # weights out of range stay float32; what is left is the mask's -inf
            return ir.Tensor(tensor.numpy().astype(dtype), name=name)

    return convert
