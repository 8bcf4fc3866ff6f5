"""Finds the layers of an ONNX graph whose weights are worth quantizing, and assigns each recipe's precision to them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from calibration.targets_and_recipes import INT4
from runtimes.errors import InputError

FLOAT, WEIGHT, STATIC, DYNAMIC, BLOCKS = "float", "w8", "w8a8", "w8a8-dynamic", "w4"
RECIPES = ("hybrid", "static", "dynamic", "weight-only", INT4)
EMBEDDING = "Gather"
EMBEDDING_ABOVE = 1 << 18  # weights of a table of words; one of positions is a thousandth of the bytes
# A product with fewer weights gains less from integers than the quantization of its input costs; it is stored only.
LARGE = 4096
# Where an error enters before everything else, leaves last, or steers every block: the first and last convolution and
# the embedding of the timestep.
SENSITIVE = ("*conv_in/*", "*conv_out/*", "time_embedding.*", "add_embedding.*", "*quant_conv/*")


@dataclass(frozen=True)
class Layer:
    """A convolution or product with a constant weight, or an embedding.

    Attributes:
        node: its name.
        op_type: Conv, MatMul or Gemm; Gather for an embedding.
        weight: name of the initializer.
        axis: of the weight, along which the outputs' channels lie.
        parameters: number of weights.
        source, result: names of its input and output tensors.
    """

    node: str
    op_type: str
    weight: str
    axis: int
    parameters: int
    source: str
    result: str


def find_layers(model: ir.Model) -> list[Layer]:
    """Every layer of the main graph, in its order."""
    found = []
    for node in model.graph:
        if node.domain or node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        source, weight = node.inputs[0], node.inputs[1]
        if source is None or weight is None or source.const_value is not None or not weight.is_initializer():
            continue
        tensor = weight.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        if node.op_type == "Gemm" and _flag(node, "transA"):
            continue
        columns = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        axis = len(tensor.shape) - 1 if columns else 0
        if columns and len(tensor.shape) != 2:
            continue
        found.append(Layer(node.name or "", node.op_type, weight.name or "", axis, tensor.size, source.name or "",
                           node.outputs[0].name or ""))
    return found


def find_embeddings(model: ir.Model) -> list[Layer]:
    """Every large table (V, D) float32 whose rows are looked up by number; `axis` is that of its rows."""
    found = []
    for node in model.graph:
        table = node.inputs[0] if node.op_type == EMBEDDING and not node.domain else None
        if table is None or not table.is_initializer() or node.attributes.get_int("axis", 0) != 0:
            continue
        tensor, numbers = table.const_value, node.inputs[1]
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2 or numbers is None:
            continue
        if tensor.size >= EMBEDDING_ABOVE:
            found.append(Layer(node.name or "", EMBEDDING, table.name or "", 0, tensor.size, numbers.name or "",
                               node.outputs[0].name or ""))
    return found


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def assign(layers: Sequence[Layer], recipe: str, keep: Sequence[str] = ()) -> dict[str, str]:
    """Precision of every layer by node name.

    Args:
        layers: from `find_layers`, and for "weight-only-4" from `find_embeddings`.
        recipe: "hybrid": convolutions and large products in integers, the rest stored in 8 bits, what is sensitive in
            float32. "static": everything in integers. "dynamic": products in integers whose activation range is
            found in each call, convolutions stored in 8 bits, since ONNX Runtime has no such kernel with a scale for
            each channel. "weight-only": everything stored in 8 bits. "weight-only-4": products stored in 4 bits, the
            rest in 8.
        keep: patterns (fnmatch) over node names and op types that stay in float32.

    Raises:
        InputError: an unknown recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"unknown quantization {recipe!r}", where="quantization", fix=f"one of {', '.join(RECIPES)}")
    exempt = set(matching(layers, keep))
    return {layer.node: FLOAT if layer.node in exempt else _own(layer, recipe) for layer in layers}


def _own(layer: Layer, recipe: str) -> str:
    if recipe == "weight-only":
        return WEIGHT
    if recipe == INT4:
        return BLOCKS if layer.op_type in ("MatMul", "Gemm") else WEIGHT
    if recipe == "dynamic":
        return DYNAMIC if layer.op_type == "MatMul" else WEIGHT
    if recipe == "static":
        return STATIC
    if any(fnmatch.fnmatchcase(layer.node, pattern) for pattern in SENSITIVE):
        return FLOAT
    if layer.op_type == "Gemm" or layer.parameters < LARGE:
        return WEIGHT
    return STATIC


def matching(layers: Sequence[Layer], patterns: Sequence[str]) -> list[str]:
    """Nodes whose name, weight or op type one of the patterns fits."""
    return [layer.node for layer in layers
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names_of(layer))]


def names_of(layer: Layer) -> tuple[str, str, str]:
    """What a pattern may name a layer by."""
    return layer.node, layer.weight, layer.op_type


def quantizable(graph: Path) -> list[str]:
    """Everything in a graph that a pattern of `keep` may name."""
    model = ir.load(graph)
    return [text for layer in (*find_layers(model), *find_embeddings(model)) for text in names_of(layer)]


def check_patterns(patterns: Sequence[str], names: Mapping[str, Sequence[str]]) -> None:
    """Refuse a pattern that fits nothing in any graph of the model.

    Args:
        patterns: fnmatch.
        names: component -> names of its nodes and weights, and op types.

    Raises:
        InputError: naming close matches.
    """
    every = sorted({name for found in names.values() for name in found})
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in every):
            near = difflib.get_close_matches(pattern, every, n=3, cutoff=0.4)
            raise InputError(f"the pattern {pattern!r} fits no layer", where="--keep",
                             fix=f"close names: {', '.join(near)}" if near else f"for example {every[0]}")
