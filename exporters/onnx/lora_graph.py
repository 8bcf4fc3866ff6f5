"""Makes the LoRA of a graph an input: y = W x becomes y = W x + up (down x), for the given modules.

Inputs and no initializers: every runtime takes them as they are, quantized or rounded weights stay untouched, and
another LoRA of any rank fits in. The price is two small products a module in every call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from runtimes.adapters.lora_inputs import input_specs


def add_lora_inputs(model: ir.Model, targets: Mapping[str, Sequence[int]]) -> None:
    """Add two inputs a module and what is computed with them, in place.

    Args:
        model: from the exporter, its weights named as the network's.
        targets: name of a module -> shape of its weight. One whose weight the graph does not use is left without
            effect, but keeps its inputs.
    """
    graph = model.graph
    inputs = {spec.name: ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ir.DataType.FLOAT))
              for spec in input_specs(targets)}
    graph.inputs.extend(inputs.values())
    for module in targets:
        down, up = inputs[f"{module}.lora_down"], inputs[f"{module}.lora_up"]
        for key in (f"{module}.weight", f"{module}.weight.T"):
            weight = graph.initializers.get(key)
            for node in [use.node for use in weight.uses()] if weight is not None else ():
                _add(node, module, down, up)


def _add(node: ir.Node, module: str, down: ir.Value, up: ir.Value) -> None:
    convolution = node.op_type == "Conv"
    kind, attributes = ("Conv", dict(node.attributes)) if convolution else ("MatMul", {})
    inner = ir.Node("", kind, [node.inputs[0], down], list(attributes.values()), name=f"{module}/LoraDown")
    outer = ir.Node("", kind, [inner.outputs[0], up], name=f"{module}/LoraUp")
    plain = node.outputs[0]
    readers = list(plain.uses())  # before the sum reads it too
    total = ir.Node("", "Add", [plain, outer.outputs[0]], name=f"{module}/LoraAdd")
    for use in readers:
        use.node.replace_input_with(use.idx, total.outputs[0])
    graph = node.graph
    if graph is not None:
        graph.insert_after(node, [inner, outer, total])
