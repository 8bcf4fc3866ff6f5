"""Triton's model repository: configurations that Triton reads, and a pipeline that generates the same images in it."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

import runtimes
from deploy.building.triton_repository import (
    TritonOptions,
    component_config,
    export_triton,
    parse_config,
    pipeline_config,
)
from runtimes.backends.onnxruntime_session import OrtSession
from runtimes.backends.session import SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import SHALLOW_ENTRY, Entry
from runtimes.bundle.tensors import Axis, ShapeRange
from runtimes.errors import InputError, UnavailableError
from runtimes.text.clip_tokenizer import prepare_tokenizer
from tests.runtimes.engine_bundles import engine_details
from tests.runtimes.fakes import write_pipeline_bundle
from tests.runtimes.roles import with_fact
from tests.runtimes.vocabulary import make_vocabulary

CLIENT = util.find_spec("tritonclient") is not None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("triton")
    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5).save_pretrained(folder / "source")
    prepare_tokenizer(folder / "source", folder / "bundle" / "tokenizer")
    return write_pipeline_bundle(folder / "bundle", len(vocab) + 1)


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    parts = {**bundle.manifest.components,
             "unet": dataclasses.replace(bundle.component("unet"), **changes)}
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, components=parts))


def test_each_component_and_the_pipeline_become_models(bundle, tmp_path):
    names = export_triton(bundle, tmp_path / "repo")
    assert names == ("ldm_text_encoder", "ldm_unet", "ldm_vae_decoder", "ldm_vae_encoder", "ldm")
    for name in names:
        assert (tmp_path / "repo" / name / "config.pbtxt").is_file()
    assert (tmp_path / "repo/ldm_unet/1/model.onnx").read_bytes() == (
        bundle.path / "components/unet/model.onnx").read_bytes()
    assert (tmp_path / "repo/ldm/1/bundle/tokenizer/tokenizer.json").is_file()
    assert not (tmp_path / "repo/ldm/1/bundle/components").exists()


def test_configurations_parse_as_tritons_own_protobuf(bundle):
    text = component_config("ldm_unet", bundle.component("unet"), TritonOptions(instances=2, queue_microseconds=500))
    if not CLIENT:
        with pytest.raises(UnavailableError, match=r"tritonclient is not installed .*tritonclient\[grpc\]"):
            parse_config(text)
        return
    made = parse_config(text)
    assert (made.name, made.backend, made.max_batch_size) == ("ldm_unet", "onnxruntime", 8)
    assert [(i.name, list(i.dims)) for i in made.input] == [
        ("sample", [2, -1, -1]), ("timestep", [1]), ("encoder_hidden_states", [5, 3])]
    assert made.input[1].HasField("reshape") and list(made.input[1].reshape.shape) == []
    assert made.input[0].data_type == made.output[0].data_type != 0
    assert made.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(made.dynamic_batching.preferred_batch_size) == [1, 8]
    assert (made.instance_group[0].count, made.instance_group[0].kind) == (2, made.instance_group[0].KIND_CPU)
    pipeline = parse_config(pipeline_config(TritonOptions()))
    assert pipeline.backend == "python"
    assert {i.name: i.optional for i in pipeline.input} == {
        field.name: field.name != "prompt" for field in dataclasses.fields(runtimes.Request) if field.name != "output"}
    with pytest.raises(InputError, match="not a model configuration"):
        parse_config("max_batch_size: many")


def test_components_load_and_run_as_tritons_onnx_backend_would(bundle, tmp_path):
    import onnxruntime

    export_triton(bundle, tmp_path / "repo")
    session = onnxruntime.InferenceSession(str(tmp_path / "repo/ldm_text_encoder/1/model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids"]


class FakeTriton(ModuleType):
    """`triton_python_backend_utils` over ONNX Runtime: what the pipeline's model sees of the server."""

    def __init__(self, bundle: Bundle, names: dict[str, str]) -> None:
        super().__init__("triton_python_backend_utils")
        sessions = {names[n]: OrtSession(bundle, n, SessionOptions(threads=1)) for n in bundle.manifest.components}
        self.calls: list[str] = []
        self.failing = ""
        self.TRITONSERVER_MEMORY_CPU = 0
        self.PreferredMemory = lambda kind: kind
        self.TritonError = lambda text: SimpleNamespace(message=lambda: text)
        self.Tensor = lambda name, array: SimpleNamespace(name=name, as_numpy=lambda: array)
        self.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(
            tensors={t.name: t for t in output_tensors}, has_error=lambda: error is not None, error=lambda: error)
        self.get_output_tensor_by_name = lambda response, name: response.tensors[name]
        self.get_input_tensor_by_name = lambda request, name: request.get(name)
        outer = self

        class InferenceRequest:
            def __init__(self, model_name, inputs, requested_output_names, preferred_memory):
                self.model, self.inputs, self.outputs = model_name, inputs, requested_output_names

            def exec(self):
                outer.calls.append(self.model)
                if self.model == outer.failing:
                    return outer.InferenceResponse([], outer.TritonError("backend is out of memory"))
                session = sessions[self.model]
                ranks = {s.name: len(s.shape) for s in session.component.inputs}
                feeds = {t.name: t.as_numpy()[:, 0] if ranks[t.name] == 1 else t.as_numpy() for t in self.inputs}
                found = session.run(feeds)
                return outer.InferenceResponse([outer.Tensor(n, found[n]) for n in self.outputs])

        self.InferenceRequest = InferenceRequest

    def request(self, **values: Any) -> dict[str, Any]:
        return {n: self.Tensor(n, np.array(v)) for n, v in values.items()}


@pytest.fixture
def served(bundle, tmp_path, monkeypatch) -> Any:
    """The pipeline's model, started in a server of our own making."""
    export_triton(bundle, tmp_path / "repo")
    folder = tmp_path / "repo" / "ldm"
    triton = FakeTriton(bundle, json.loads((folder / "1" / "triton.json").read_text()))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_repository": str(folder), "model_version": "1"})
    return SimpleNamespace(model=model, triton=triton)


def test_the_served_pipeline_generates_what_the_bundle_generates(bundle, served):
    request = served.triton.request(prompt=[b"a red apple", b"cat"], steps=[4], seed=[3], guidance_scale=[2.0])
    (response,) = served.model.execute([request])
    images = response.tensors["images"].as_numpy()
    expected = runtimes.load(bundle.path, threads=1)(["a red apple", "cat"], steps=4, seed=3, guidance_scale=2.0)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, np.stack([np.asarray(i) for i in expected]))
    assert set(served.triton.calls) == {"ldm_text_encoder", "ldm_unet", "ldm_vae_decoder"}


def test_a_bundle_with_a_step_cache_is_served_every_step_whole(bundle, tmp_path, monkeypatch):
    parts = {**bundle.manifest.components, "unet_shallow": bundle.component("unet")}
    entries = {SHALLOW_ENTRY: Entry("unet_shallow", ())}
    roles = with_fact(bundle.manifest.pipeline, "denoiser.entries", entries)
    cached = Bundle(bundle.path, dataclasses.replace(bundle.manifest, components=parts, pipeline=roles))
    names = export_triton(cached, tmp_path / "repo")
    assert "ldm_unet_shallow" not in names
    folder = tmp_path / "repo" / "ldm"
    triton = FakeTriton(bundle, json.loads((folder / "1" / "triton.json").read_text()))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_repository": str(folder), "model_version": "1"})
    (response,) = model.execute([triton.request(prompt=[b"cat"], steps=[2])])
    assert not response.has_error() and response.tensors["images"].as_numpy().shape == (1, 32, 32, 3)


def test_a_bad_request_gets_its_error_and_the_others_their_images(served):
    good = served.triton.request(prompt=[b"cat"], steps=[2])
    bad = served.triton.request(prompt=[b"cat"], steps=[0])
    unknown = served.triton.request(prompt=[b"cat"], scheduler=[b"magic"])
    first, second, third = served.model.execute([bad, good, unknown])
    assert "steps" in first.error().message() and "magic" in third.error().message()
    assert not second.has_error()


def test_what_fails_in_a_component_is_named(served):
    served.triton.failing = "ldm_unet"
    (response,) = served.model.execute([served.triton.request(prompt=[b"cat"], steps=[2])])
    assert response.error().message().startswith("unet: backend is out of memory")


def test_writing_again_replaces_only_what_we_wrote(bundle, tmp_path):
    export_triton(bundle, tmp_path / "repo")
    export_triton(bundle, tmp_path / "repo", TritonOptions(prefix="other_"))
    assert (tmp_path / "repo/other_unet").is_dir() and not (tmp_path / "repo/ldm_unet").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="no model repository of ours; it is left as it was"):
        export_triton(bundle, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "repo"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": "safetensors"}, "no backend for the format 'safetensors'"),
    ({"format": "tensorrt", "details": engine_details(builder="tensorrt-rtx")},
     "does not load engines of TensorRT for RTX"),
    ({"axes": {"batch": Axis("images", ShapeRange(2, 2, 4))}}, "takes 2 rows or more, and Triton sends single ones"),
])
def test_what_triton_cannot_serve_is_refused(bundle, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        export_triton(changed(bundle, **changes), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_engines_of_tensorrt_are_plans_on_a_gpu(bundle):
    part = dataclasses.replace(bundle.component("unet"), format="tensorrt", details=engine_details())
    text = component_config("u", part, TritonOptions())
    assert 'backend: "tensorrt"' in text and '"model.plan"' in text and "KIND_GPU" in text


def test_the_pipelines_file_ships_with_the_package(root):
    text = Path(root / "deploy" / "templates" / "triton" / "model.py").read_text()
    assert "import torch" not in text and "diffusers" not in text
