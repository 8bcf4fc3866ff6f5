"""Writes a bundle as a model repository for NVIDIA Triton Inference Server: a model per component, and the pipeline.

The components run in Triton's own backends, with its batching and its instances; the pipeline is a model of the Python
backend that calls them and needs numpy, Pillow, tokenizers and our `runtimes`, not torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle, committed, link_or_copy
from runtimes.bundle.manifest import MANIFEST_FILE, Component, dumps
from runtimes.bundle.roles import ROWS, Role
from runtimes.bundle.tensors import ShapeRange, TensorSpec
from runtimes.errors import InputError, UnavailableError
from runtimes.inputs.request import Request

PIPELINE_TEMPLATE = Path(__file__).parents[1] / "templates" / "triton" / "model.py"
MAP_FILE = "triton.json"  # component -> name of its model, read by the pipeline
DATA_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32",
              "bool": "TYPE_BOOL"}
# Our format -> Triton's backend and the name that it expects of the entry file.
BACKENDS = {"onnx": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan"),
            "openvino": ("openvino", "model.xml")}
MARKER = "ldm-deploy-triton.json"  # so that only our own output is ever replaced


@dataclass(frozen=True)
class TritonOptions:
    """How Triton should run the models.

    Attributes:
        instances: copies of each component that run at once; the weights of each are loaded again.
        gpu: run components on GPUs; the pipeline stays on the CPU.
        queue_microseconds: how long a component waits for more requests to put into one batch.
        prefix: of the components' names, so that several bundles fit into one server.
        pipeline: name of the pipeline's model.
    """

    instances: int = 1
    gpu: bool = False
    queue_microseconds: int = 1000
    prefix: str = "ldm_"
    pipeline: str = "ldm"


def export_triton(bundle: Bundle, out: Path, options: TritonOptions | None = None) -> tuple[str, ...]:
    """Write a model repository; `tritonserver --model-repository OUT` serves it.

    Args:
        bundle: of the format onnx, openvino or tensorrt (of the builder `tensorrt`).
        out: a new folder, or one that this function wrote before; appears whole or not at all.
        options: how Triton should run it.

    Returns:
        the names of the models, the pipeline's last.

    Raises:
        InputError: a format that no backend of Triton runs, an input that it cannot batch, or an output folder that
            is something else.
    """
    options = options or TritonOptions()
    if options.instances < 1 or options.queue_microseconds < 0:
        raise InputError("instances must be at least 1 and the delay at least 0", where="export-triton")
    # The repository's pipeline computes every step whole.
    role = bundle.manifest.pipeline.role
    components = {n: c for n, c in bundle.manifest.components.items() if role(n) is not Role.SHALLOW}
    for name, component in components.items():
        check_servable(name, component)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise InputError("the output exists and is no model repository of ours; it is left as it was", where=str(out),
                         fix="choose another -o or remove it yourself")
    names = {name: options.prefix + name for name in components}
    staging = out.with_name(f".{out.name}.triton")
    shutil.rmtree(staging, ignore_errors=True)
    with committed(staging) as folder:
        for name, component in components.items():
            _write_component(bundle, component, folder / names[name], names[name], options)
        _write_pipeline(bundle, folder / options.pipeline, names, options)
        (folder / MARKER).write_text(json.dumps({"bundle": bundle.manifest.digest}), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)
    return (*names.values(), options.pipeline)


def check_servable(name: str, component: Component) -> None:
    """Refuse what Triton's backends do not load.

    Raises:
        InputError: says what to build instead.
    """
    if component.format not in BACKENDS:
        raise InputError(f"Triton has no backend for the format {component.format!r}", where=name,
                         fix=f"build for one of {', '.join(BACKENDS)}")
    if component.format == "tensorrt" and component.details_as(EngineDetails).builder != "tensorrt":
        raise InputError("Triton's TensorRT backend does not load engines of TensorRT for RTX", where=name,
                         fix="build for --target onnxruntime, or for --target tensorrt on the server's GPU")
    if component.details.lora:
        raise InputError("its LoRA is an input, which nothing there feeds", where=name,
                         fix="build with --lora-mode merge")
    for spec in (*component.inputs, *component.outputs):
        if not spec.shape or spec.shape[0] not in ("batch", ROWS):
            raise InputError(f"{spec.name} has no batch as its first axis, so Triton cannot batch it", where=name)
    if (least := _rows(component).min) > 1:
        raise InputError(f"it takes {least} rows or more, and Triton sends single ones", where=name,
                         fix="build with --shapes batch=1:...")


def component_config(name: str, component: Component, options: TritonOptions) -> str:
    """config.pbtxt of one component, in protobuf's text format."""
    backend, file = BACKENDS[component.format]
    axis = _rows(component)
    lines = [f'name: "{name}"', f'backend: "{backend}"', f'default_model_filename: "{file}"',
             f"max_batch_size: {axis.max}"]
    lines += [_tensor("input", spec) for spec in component.inputs]
    lines += [_tensor("output", spec) for spec in component.outputs]
    preferred = sorted({axis.opt, axis.max})
    lines.append(f"dynamic_batching {{ preferred_batch_size: [ {', '.join(map(str, preferred))} ] "
                 f"max_queue_delay_microseconds: {options.queue_microseconds} }}")
    kind = "KIND_GPU" if options.gpu or component.format == "tensorrt" else "KIND_CPU"
    lines.append(f"instance_group [ {{ count: {options.instances} kind: {kind} }} ]")
    return "\n".join(lines) + "\n"


def _rows(component: Component) -> ShapeRange:
    """How many rows a call takes."""
    return component.axes[str(component.inputs[0].shape[0])].range


def _tensor(kind: str, spec: TensorSpec) -> str:
    """One input or output without its batch axis, which Triton adds."""
    dims = [d if isinstance(d, int) else -1 for d in spec.shape[1:]]
    # Triton knows no empty shape: a scalar per row, such as a timestep, is one number that the backend gets as none.
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} [ {{ name: "{spec.name}" data_type: {DATA_TYPES[spec.dtype]} {shape} }} ]'


def request_inputs() -> dict[str, str]:
    """The pipeline's inputs, one for each field of a request that a tensor can hold: name -> line of config.pbtxt."""
    inputs = {}
    for declared in dataclasses.fields(Request):
        if (tensor := declared.metadata["kind"].tensor) is not None:
            dims = ", ".join(map(str, tensor[1]))
            optional = "" if declared.name == "prompt" else " optional: true"
            text = f'name: "{declared.name}" data_type: {tensor[0]} dims: [ {dims} ]{optional}'
            inputs[declared.name] = f"input [ {{ {text} }} ]"
    return inputs


def pipeline_config(options: TritonOptions) -> str:
    """config.pbtxt of the pipeline: the fields of a request in, (images, height, width, 3) bytes out."""
    lines = [f'name: "{options.pipeline}"', 'backend: "python"', "max_batch_size: 0", *request_inputs().values()]
    lines += ['output [ { name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, -1, 3 ] } ]',
              # Requests wait for the networks, not for Python: more of them in flight fill the networks' batches.
              f"instance_group [ {{ count: {max(2, options.instances)} kind: KIND_CPU }} ]"]
    return "\n".join(lines) + "\n"


def _write_component(bundle: Bundle, component: Component, folder: Path, name: str, options: TritonOptions) -> None:
    entry, expected = component.file, BACKENDS[component.format][1]
    parent = PurePosixPath(entry).parent
    for file in component.files:
        relative = PurePosixPath(file).relative_to(parent)
        link_or_copy(bundle.file(file), folder / "1" / (expected if file == entry else str(relative)))
    (folder / "config.pbtxt").write_text(component_config(name, component, options), encoding="utf-8")


def _write_pipeline(bundle: Bundle, folder: Path, names: Mapping[str, str], options: TritonOptions) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(PIPELINE_TEMPLATE, version / "model.py")
    for file in bundle.manifest.files:
        link_or_copy(bundle.file(file), version / "bundle" / file)
    (version / "bundle").mkdir(exist_ok=True)
    (version / "bundle" / MANIFEST_FILE).write_text(dumps(bundle.manifest), encoding="utf-8")
    (version / MAP_FILE).write_text(json.dumps(dict(names)), encoding="utf-8")
    (folder / "config.pbtxt").write_text(pipeline_config(options), encoding="utf-8")


def parse_config(text: str) -> Any:
    """Read a config.pbtxt with Triton's own protobuf definition.

    Raises:
        InputError: not valid; says line and column.
        UnavailableError: tritonclient is not installed.
    """
    try:
        text_format: Any = importlib.import_module("google.protobuf.text_format")
        definition: Any = importlib.import_module("tritonclient.grpc.model_config_pb2")
    except ImportError as error:
        raise UnavailableError("tritonclient is not installed", where="config.pbtxt",
                               fix="pip install 'tritonclient[grpc]'") from error
    try:
        return text_format.Parse(text, definition.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"not a model configuration: {error}", where="config.pbtxt") from error
