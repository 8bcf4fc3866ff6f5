"""Sessions and bundles small enough to reason about: numpy functions, and ONNX graphs of a few nodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtimes.backends.session import Session
from runtimes.bundle.folder import Bundle, records_below, write_manifest
from runtimes.bundle.manifest import SCHEMA, Component, Manifest, Source
from runtimes.bundle.roles import SHALLOW_ENTRY, Entry, Roles
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.pipeline.diffusion import Pipeline
from tests.runtimes.roles import stable_diffusion

CHANNELS, FACTOR, TOKENS, WIDTH = 2, 4, 5, 3
FACTS = stable_diffusion(CHANNELS, FACTOR, 0.5, 32, 32, TOKENS)
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def axes(batch: ShapeRange, side: ShapeRange, multiple: int = 1) -> dict[str, Axis]:
    return {"batch": Axis("images", batch), "height": Axis("rows", side, multiple),
            "width": Axis("columns", side, multiple)}


def component(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], axes: Mapping[str, Axis], **changes: Any
) -> Component:
    values: dict[str, Any] = {"format": "onnx", "file": "model.onnx", "files": {}, "class_name": "Fake",
                              "precision": "fp32", "parameters": 1, "details": {}}
    return Component(inputs=inputs, outputs=outputs, axes=axes, **(values | changes))


def components(batch: int = 8, side: tuple[int, int] = (4, 16), multiple: int = 2) -> dict[str, Component]:
    """The four components' I/O, as a family declares it."""
    rows, small = ShapeRange(1, 1, batch), ShapeRange(side[0], side[0], side[1])
    pixels = ShapeRange(side[0] * FACTOR, side[0] * FACTOR, side[1] * FACTOR)
    image = ("batch", 3, "height", "width")
    latent = ("batch", CHANNELS, "height", "width")
    hidden = ("batch", TOKENS, WIDTH)
    return {
        "text_encoder": component(
            (TensorSpec("input_ids", "int64", ("batch", TOKENS)),),
            (TensorSpec("last_hidden_state", "float32", hidden),),
            {"batch": Axis("prompts", rows)}),
        "unet": component(
            (TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ("batch",)),
             TensorSpec("encoder_hidden_states", "float32", hidden)),
            (TensorSpec("out_sample", "float32", latent),), axes(rows, small, multiple)),
        "vae_encoder": component(
            (TensorSpec("sample", "float32", image),),
            (TensorSpec("latent_parameters", "float32", ("batch", 2 * CHANNELS, "height/4", "width/4")),),
            axes(rows, pixels, FACTOR)),
        "vae_decoder": component(
            (TensorSpec("latent_sample", "float32", latent),),
            (TensorSpec("sample", "float32", ("batch", 3, "height*4", "width*4")),), axes(rows, small)),
    }


class FakeSession(Session):
    """A numpy function as a component; every call is recorded."""

    def __init__(self, name: str, component: Component, function: Callable[..., np.ndarray]) -> None:
        super().__init__(name, component)
        self.function = function
        self.calls: list[dict[str, np.ndarray]] = []

    def _run(self, feeds):
        self.calls.append({name: np.array(value) for name, value in feeds.items()})
        return {self.component.outputs[0].name: self.function(**feeds)}


def text_encoder(input_ids):
    return np.sin(input_ids[:, :, None] * np.arange(1, WIDTH + 1)).astype(np.float32)


def unet(sample, timestep, encoder_hidden_states):
    shift = encoder_hidden_states.mean(axis=(1, 2))[:, None, None, None]
    return (np.tanh(sample) * 0.7 + np.roll(sample, 1, axis=3) * 0.2 + shift * 0.3
            + timestep[:, None, None, None] / 5000).astype(np.float32)


def vae_encoder(sample):
    small = sample[:, :CHANNELS, ::FACTOR, ::FACTOR]
    return np.concatenate([small, small * 0.1 - 3], axis=1)


def vae_decoder(latent_sample):
    large = latent_sample.repeat(FACTOR, axis=2).repeat(FACTOR, axis=3)
    return np.concatenate([large, large[:, :1] * 0.5], axis=1)


def fake_sessions(**limits: Any) -> dict[str, FakeSession]:
    functions: dict[str, Callable[..., np.ndarray]] = {
        "text_encoder": text_encoder, "unet": unet, "vae_encoder": vae_encoder, "vae_decoder": vae_decoder}
    return {name: FakeSession(name, part, functions[name]) for name, part in components(**limits).items()}


def calls_of(pipeline: Pipeline, name: str) -> list[dict[str, np.ndarray]]:
    """What a fake session of the pipeline was fed so far."""
    session = pipeline.sessions[name]
    assert isinstance(session, FakeSession)
    return session.calls


def tokenize(texts):
    """Not CLIP: a few numbers per text."""
    rows = [[len(text), *text.encode()[: TOKENS - 1]] for text in texts]
    return np.array([row + [0] * (TOKENS - len(row)) for row in rows], np.int64)


def cached_pipeline(**limits: Any) -> Pipeline:
    """A fake U-Net of two entries: the deep feature is the prompt's shift, which the shallow one adds."""
    sessions = fake_sessions(**limits)
    part = sessions["unet"].component
    feature = TensorSpec("deep_feature", "float32", ("batch", CHANNELS, "height", "width"))

    def deep(sample, timestep, encoder_hidden_states):
        return np.tanh(sample) * 0.7 + encoder_hidden_states.mean(axis=(1, 2))[:, None, None, None] * 0.3

    class Whole(FakeSession):
        def _run(self, feeds):
            return {**super()._run(feeds), "deep_feature": deep(**feeds).astype(np.float32)}

    def shallow(sample, timestep, encoder_hidden_states, deep_feature):
        moved = np.roll(sample, 1, axis=3) * 0.2
        return (deep_feature + moved + timestep[:, None, None, None] / 5000).astype(np.float32)

    sessions["unet"] = Whole("unet", dataclasses.replace(part, outputs=(*part.outputs, feature)), unet)
    sessions["unet_shallow"] = FakeSession(
        "unet_shallow", dataclasses.replace(part, inputs=(*part.inputs, feature)), shallow)
    return Pipeline(sessions, with_a_shallow_entry(FACTS), DDIM, tokenize)


def with_a_shallow_entry(roles: Roles) -> Roles:
    entries = {SHALLOW_ENTRY: Entry("unet_shallow", ("deep_feature",))}
    return dataclasses.replace(roles, denoiser=dataclasses.replace(roles.denoiser, entries=entries))


# ---- graphs and bundles ------------------------------------------------------------------------------------------


def graph(
    inputs: list, outputs: list, nodes: list, constants: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """An ONNX model from (name, dtype, shape) triples and helper.make_node results."""
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(*i) for i in inputs], [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def affine_model() -> onnx.ModelProto:
    """y = x @ w + b on (batch, 4)."""
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    return graph([("x", TensorProto.FLOAT, ["batch", 4])], [("y", TensorProto.FLOAT, ["batch", 3])],
                 [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
                 {"w": weights, "b": np.array([1, 2, 3], np.float32)})


AFFINE = component((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 3)),),
                   {"batch": Axis("rows", ShapeRange(1, 2, 8))}, file="components/affine/model.onnx")


def write_bundle(folder: Path, parts: Mapping[str, Component], roles: Roles = FACTS) -> Bundle:
    """Finish a folder whose components' files lie in components/NAME, as the build does."""
    extra = {**records_below(folder / "tokenizer", folder), **records_below(folder / "scheduler", folder)}
    listed = {}
    for name, part in parts.items():
        records = records_below(folder / "components" / name, folder)
        listed[name] = dataclasses.replace(part, files=records, parity={})
    manifest = Manifest(schema=SCHEMA, family="stable-diffusion", source=Source("fake", {}), target="onnxruntime",
                        precision="fp32", pipeline=roles, components=listed, passes=(), files=extra, tools={}, spec={},
                        verified=False, parity={})
    write_manifest(folder, manifest)
    return Bundle.open(folder)


def affine_bundle(folder: Path, model: onnx.ModelProto | bytes | None = None, part: Component = AFFINE,
                  **save: Any) -> Bundle:
    file = folder / part.file
    file.parent.mkdir(parents=True)
    if isinstance(model, bytes):
        file.write_bytes(model)
    else:
        onnx.save(model or affine_model(), file, **save)
    return write_bundle(folder, {"affine": part})


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_pipeline_bundle(folder: Path, vocabulary: int, *, shallow: bool = False) -> Bundle:
    """A bundle of ONNX graphs of a few nodes; the caller has written tokenizer/."""
    f, i = TensorProto.FLOAT, TensorProto.INT64
    node, latent = helper.make_node, ["batch", CHANNELS, "height", "width"]
    table = np.sin(np.arange(vocabulary * WIDTH, dtype=np.float32)).reshape(vocabulary, WIDTH)
    outputs = [("out_sample", f, latent), ("deep_feature", f, latent)]
    constants = {"last": np.array([1, 2], np.int64), "column": np.array([-1, 1, 1, 1], np.int64),
                 "thousands": np.float32(5000)}
    graphs = {
        "text_encoder": graph(
            [("input_ids", i, ["batch", TOKENS])], [("last_hidden_state", f, ["batch", TOKENS, WIDTH])],
            [node("Gather", ["table", "input_ids"], ["last_hidden_state"])], {"table": table}),
        "unet": graph(
            [("sample", f, latent), ("timestep", f, ["batch"]),
             ("encoder_hidden_states", f, ["batch", TOKENS, WIDTH])], outputs if shallow else outputs[:1],
            [node("ReduceMean", ["encoder_hidden_states", "last"], ["mean"], keepdims=1),
             node("Reshape", ["mean", "column"], ["shift"]), node("Tanh", ["sample"], ["tanh"]),
             node("Div", ["timestep", "thousands"], ["t"]), node("Reshape", ["t", "column"], ["time"]),
             node("Add", ["tanh", "shift"], ["deep_feature"]), node("Add", ["deep_feature", "time"], ["out_sample"])],
            constants),
        "vae_encoder": graph(
            [("sample", f, ["batch", 3, "height", "width"])],
            [("latent_parameters", f, ["batch", 2 * CHANNELS, "h", "w"])],
            [node("AveragePool", ["sample"], ["small"], kernel_shape=[FACTOR] * 2, strides=[FACTOR] * 2),
             node("Gather", ["small", "channels"], ["latent_parameters"], axis=1)],
            {"channels": np.array([0, 1, 1, 2], np.int64)}),
        "vae_decoder": graph(
            [("latent_sample", f, latent)], [("sample", f, ["batch", 3, "h", "w"])],
            [node("Gather", ["latent_sample", "channels"], ["rgb"], axis=1),
             node("Resize", ["rgb", "", "scales"], ["sample"], mode="nearest")],
            {"channels": np.array([0, 1, 0], np.int64), "scales": np.array([1, 1, FACTOR, FACTOR], np.float32)}),
    }
    declared, roles = components(), FACTS
    if shallow:
        graphs["unet_shallow"] = graph(
            [("sample", f, latent), ("timestep", f, ["batch"]), ("encoder_hidden_states", f, ["batch", TOKENS, WIDTH]),
             ("deep_feature", f, latent)], [("out_sample", f, latent)],
            [node("ReduceMean", ["encoder_hidden_states", "last"], ["mean"], keepdims=1),
             node("Reshape", ["mean", "column"], ["shift"]), node("Mul", ["sample", "shift"], ["product"]),
             node("Div", ["timestep", "thousands"], ["t"]), node("Reshape", ["t", "column"], ["time"]),
             node("Add", ["deep_feature", "product"], ["sum"]), node("Add", ["sum", "time"], ["out_sample"])],
            constants)
        unet, deep = declared["unet"], TensorSpec("deep_feature", "float32", ("batch", CHANNELS, "height", "width"))
        declared["unet"] = dataclasses.replace(unet, outputs=(*unet.outputs, deep))
        declared["unet_shallow"] = dataclasses.replace(unet, inputs=(*unet.inputs, deep))
        roles = with_a_shallow_entry(FACTS)
    parts = {}
    for name, part in declared.items():
        file = folder / "components" / name / "model.onnx"
        file.parent.mkdir(parents=True)
        onnx.save(graphs[name], file)
        parts[name] = dataclasses.replace(part, file=file.relative_to(folder).as_posix())
    write_json(folder / "scheduler" / "scheduler_config.json", DDIM)
    return write_bundle(folder, parts, roles)
