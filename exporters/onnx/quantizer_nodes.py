"""Finds the Q/DQ pairs of a graph, and the attention blocks that a compiler cannot fuse because of them. Reads only.

TensorRT fuses MatMul - Softmax - MatMul into one kernel only if nothing is quantized in between; INT8 U-Nets that
quantize there were slower than float16 (TensorRT issues 2905: 111 ms against 43, and 3724).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# What may stand between the products and the softmax of one attention.
TRANSPARENT = (*QUANTIZERS, "Cast", "Mul", "Div", "Add", "Where", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
REACH = 8  # nodes


@dataclass(frozen=True)
class Quantizers:
    """Quantization as it lies in a graph.

    Attributes:
        inputs: op type -> how many of its inputs come out of a DequantizeLinear.
        attentions: MatMul - Softmax - MatMul blocks.
        broken: names of the Softmax nodes of those that hold a quantizer.
    """

    inputs: dict[str, int]
    attentions: int
    broken: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For the manifest's details."""
        return {"inputs": self.inputs, "attentions": self.attentions, "broken_attentions": list(self.broken)}


def find_quantizers(graph: Path) -> Quantizers:
    """Read a graph without its weights.

    Args:
        graph: ONNX file; external weights are not touched.
    """
    nodes = list(ir.load(graph).graph)
    inputs = Counter(node.op_type for node in nodes if node.op_type not in QUANTIZERS
                     for value in node.inputs if _made_by(value, "DequantizeLinear"))
    attentions, broken = 0, []
    for node in nodes:
        if node.op_type != "Softmax":
            continue
        scores, weighted = _walk(node, _producers), _walk(node, _consumers)
        if scores is None or weighted is None:
            continue
        attentions += 1
        products = (scores[0], weighted[0])
        around = any(_made_by(value, "DequantizeLinear") for product in products for value in product.inputs)
        if around or any(n.op_type in QUANTIZERS for _, path in (scores, weighted) for n in path):
            broken.append(node.name or node.outputs[0].name or "")
    return Quantizers(dict(sorted(inputs.items())), attentions, tuple(broken))


def _walk(start: ir.Node, following: Callable[[ir.Node], Iterable[ir.Node]]) -> tuple[ir.Node, list[ir.Node]] | None:
    """The nearest MatMul and what lies before it, through nodes that an attention kernel absorbs."""
    path: list[ir.Node] = []
    edge = list(following(start))
    for _ in range(REACH):
        product = next((node for node in edge if node.op_type == "MatMul"), None)
        if product is not None:
            return product, path
        edge = [node for node in edge if node.op_type in TRANSPARENT]
        path += edge
        edge = [further for node in edge for further in following(node)]
    return None


def _producers(node: ir.Node) -> list[ir.Node]:
    return [producer for value in node.inputs if value is not None and (producer := value.producer()) is not None]


def _consumers(node: ir.Node) -> list[ir.Node]:
    return [use.node for value in node.outputs for use in value.uses()]


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == op_type
