"""Exports a component to ONNX: traced once with dynamic axes, named as its TensorSpecs say, the same bytes every time.

Imports torch and onnx; import it inside the function that needs it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from exporters.families import ComponentSpec
from exporters.onnx import canonical
from exporters.onnx.lora_graph import add_lora_inputs
from exporters.onnx.stored_weights import StoredWeight
from exporters.onnx.streaming import attach_weights
from exporters.onnx.translations import translations
from exporters.quiet import one_line, quiet
from runtimes.adapters.lora_inputs import input_specs
from runtimes.bundle.folder import translated_disk_errors
from runtimes.bundle.tensors import TensorSpec
from runtimes.errors import DeployError, InputError

OPSET = 20  # the newest that onnxruntime, OpenVINO and TensorRT 10 all read completely
EXTERNAL_ABOVE_BYTES = 1 << 30
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "int32": torch.int32,
                 "bool": torch.bool}


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        file: the graph; weights too, unless `data` holds them.
        data: external weights beside it, or None.
        opset: of the default domain.
        nodes: number of nodes per op type.
        parameters: number of weights in the graph.
    """

    file: Path
    data: Path | None
    opset: int
    nodes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0


def export_onnx(
    module: torch.nn.Module, spec: ComponentSpec, out_folder: Path, *, opset: int = OPSET,
    stored: Mapping[int, StoredWeight] | None = None, lora: Mapping[str, Sequence[int]] | None = None,
) -> ExportResult:
    """Export a component.

    Args:
        module: from `exporters.source.networks.torch_component`; its parameters may be memory-mapped.
        spec: names, dtypes and axes of inputs and outputs.
        out_folder: receives model.onnx, and model.onnx.data above 1 GiB of weights.
        opset: of the default ONNX domain.
        stored: where the contents of the module's parameters are, if it comes from `exporters.onnx.streaming`.
        lora: modules that get a LoRA as inputs of the graph -> the shapes of their weights; see `lora_graph`.

    Raises:
        InputError: an operator that ONNX cannot express, a network that PyTorch cannot run, or a shape that is
            fixed inside the network.
        DeployError: the exported graph does not pass the checker.
    """
    model = traced(module, spec, opset, stored)
    if lora:
        add_lora_inputs(model, lora)
        spec = replace(spec, inputs=(*spec.inputs, *input_specs(lora)))
    data = save_model(model, out_folder / MODEL_FILE)
    check_model(out_folder / MODEL_FILE, spec)
    weights = sum(value.const_value.size for value in model.graph.initializers.values()
                  if value.const_value is not None and value.const_value.dtype.is_floating_point())
    return ExportResult(out_folder / MODEL_FILE, data, opset, count_nodes(model), weights)


def traced(module: torch.nn.Module, spec: ComponentSpec, opset: int = OPSET,
           stored: Mapping[int, StoredWeight] | None = None) -> ir.Model:
    """The graph that `export_onnx` writes, in memory: its weights are torch's or, if `stored`, still in their files.

    Raises:
        InputError: as `export_onnx`.
    """
    model = _as_exported(module, spec, opset)
    if stored is not None:
        attach_weights(model, stored)
    _name_inputs_and_outputs(model, spec)
    with quiet():
        canonical.canonicalize(model)
    return model


def example_inputs(spec: ComponentSpec, sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Inputs at given sizes of the axes: standard-normal noise from seed 0 for floats, ones for the other dtypes.

    Args:
        spec: declares the inputs: each result has the declared shape and dtype, in the order of `spec.inputs`.
        sizes: axis -> its length.
    """
    generator = torch.Generator().manual_seed(0)

    def one(tensor: TensorSpec) -> torch.Tensor:
        shape, dtype = tensor.resolve(sizes), _TORCH_DTYPES[tensor.dtype]
        return torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.ones(
            shape, dtype=dtype)

    return tuple(one(tensor) for tensor in spec.inputs)


def _as_exported(module: torch.nn.Module, spec: ComponentSpec, opset: int) -> ir.Model:
    """The graph as the exporter makes it: every named dimension dynamic, weights still torch's."""
    dynamic = tuple(
        {i: torch.export.Dim.DYNAMIC for i, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    )
    try:
        with quiet(), torch.no_grad(), _any_size(module, spec):
            program = torch.onnx.export(
                module,
                example_inputs(spec, spec.example_sizes()),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                opset_version=opset,
                custom_translation_table=translations(),
                optimize=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, ValueError, RuntimeError) as error:
        raise _unrunnable(module, spec) or _explained(error, spec) from error
    if program is None:
        raise DeployError("the exporter returned nothing", where=spec.name)
    model: ir.Model = program.model
    return model


@contextmanager
def _any_size(module: torch.nn.Module, spec: ComponentSpec) -> Iterator[None]:
    """Let U-Nets double to the size that they halved, whatever it was, if the spec promises every size.

    `UNet2DConditionModel.forward` does so (`forward_upsample_size`) where a side is no multiple of
    2^num_upsamplers. Of 2^40 none is, and the tracer knows it: the graph then has no fixed factor of 2.
    """
    unets = [part for part in module.modules() if hasattr(part, "num_upsamplers")] if spec.any_size else []
    counts = [unet.num_upsamplers for unet in unets]
    try:
        for unet in unets:
            unet.num_upsamplers = 40  # type: ignore[assignment]
        yield
    finally:
        for unet, count in zip(unets, counts, strict=True):
            unet.num_upsamplers = count


def _unrunnable(module: torch.nn.Module, spec: ComponentSpec) -> InputError | None:
    """What is wrong with a network that PyTorch itself cannot run, so that no exporter could; None if it can."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            module(*(tensor.to(device) for tensor in example_inputs(spec, spec.example_sizes())))
    except MemoryError:
        return None
    except Exception as error:  # whatever the layers of a config that fits its weights raise when they meet
        return InputError(f"PyTorch cannot run the network: {type(error).__name__}: {one_line(error)}", where=spec.name,
                          fix="correct its config.json: diffusers cannot run it either")
    return None


def _explained(error: BaseException, spec: ComponentSpec) -> DeployError:
    """The exporter's failure as one line: which operator, or which dimension."""
    messages, link = [], error
    while link is not None:
        messages.append(str(link))
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    text = "\n".join(messages)
    if operator := re.search(r"torch\.ops\.([\w]+\.[\w]+)|No decompositions registered for.*?'([\w:.]+)'", text):
        name = (operator[1] or operator[2]).replace(".", "::", 1)
        return InputError(f"the operator {name} cannot be exported to ONNX", where=spec.name,
                          fix="use a model without it")
    if "specialized" in text or "Constraints violated" in text:
        first = next((line.strip() for line in text.splitlines() if "specialized" in line), "a fixed size")
        return InputError(f"the network works at one size only: {first:.200}", where=spec.name,
                          fix="use a model whose shapes are dynamic")
    line = next((m.strip().splitlines()[0] for m in reversed(messages) if m.strip()), type(error).__name__)
    return DeployError(f"export to ONNX failed: {line:.300}", where=spec.name)


def _name_inputs_and_outputs(model: ir.Model, spec: ComponentSpec) -> None:
    """Give graph inputs and outputs the names, dtypes and symbolic shapes of the spec."""
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise DeployError(f"the graph has {len(values)} inputs or outputs, the spec {len(tensors)}",
                              where=spec.name)
        for value, tensor in zip(values, tensors, strict=True):
            traced = value.shape
            if traced is not None and (len(traced) != len(tensor.shape) or any(
                isinstance(a, int) and a != b for a, b in zip(traced, tensor.shape, strict=True)
            )):
                raise InputError(f"{tensor.name} has shape {traced}, expected {tensor.shape}", where=spec.name,
                                 fix="the config.json does not describe this network")
            value.name = tensor.name
    canonical.rename_dimensions(model, [(value.shape, tensor.shape) for value, tensor in
                                             zip(model.graph.inputs, spec.inputs, strict=True)])
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(tensor.shape)


def save_model(model: ir.Model, file: Path) -> Path | None:
    """Write a model; above 1 GiB of weights they go to a file beside it.

    Returns:
        the file of external weights, or None.

    Raises:
        UnavailableError: the disk is full.
    """
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = file.name + ".data" if size > EXTERNAL_ABOVE_BYTES else None
    with translated_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, file, external_data=external)
    return file.with_name(external) if external else None


def check_model(file: Path, spec: ComponentSpec) -> None:
    """ONNX checker, strict shape inference, and the spec's names and dimensions.

    Raises:
        DeployError: what does not hold; it is a bug of ours, not of the model.
    """
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DeployError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}",
                          where=spec.name) from error
    graph = onnx.load(str(file), load_external_data=False).graph
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        found = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        wanted = [(t.name, t.shape) for t in tensors]
        if found != wanted:
            raise DeployError(f"the graph has {found}, the spec {wanted}", where=spec.name)


def count_nodes(model: ir.Model) -> dict[str, int]:
    """Nodes per op type, most frequent first; other domains than ONNX's are named."""
    counts = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


