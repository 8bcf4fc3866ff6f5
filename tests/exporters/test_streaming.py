"""Weights that go from file to file give the same graph as weights in memory, whatever layout and dtype they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.families import family_of
from exporters.families.open_source import open_source
from runtimes.errors import DeployError, InputError
from tests.exporters.exporting import export_component
from tests.exporters.pipelines import edit_weights, to_old_layout


def streamed(folder: Path, name: str, out: Path) -> Path:
    from exporters.onnx.streaming import unread_module
    from exporters.onnx.trace import export_onnx
    from exporters.source.networks import torch_component

    source = open_source(folder)
    family = family_of(source.pipeline_class)
    spec, role = family.components(source, {})[name], family.roles(source).role(name)
    origin = source.components[spec.source_component]
    module, stored = unread_module(origin.folder, origin.library, origin.class_name)
    return export_onnx(torch_component(role, module), spec, out, stored=stored).file


@pytest.mark.parametrize(("name", "weights", "dtype"), [
    ("text_encoder", "text_encoder/model.safetensors", "bfloat16"),
    ("vae_encoder", "vae/diffusion_pytorch_model.safetensors", "float32"),
])
def test_same_bytes_as_from_memory(name: str, weights: str, dtype: str, pipeline: Path, tmp_path: Path) -> None:
    import torch

    to_old_layout(pipeline)  # other names, 1x1 convolutions for linear layers, a buffer that is computed
    kind = getattr(torch, dtype)
    edit_weights(pipeline / weights, lambda tensors: {
        key: value.to(kind) if value.is_floating_point() else value for key, value in tensors.items()})
    expected = export_component(open_source(pipeline), name, tmp_path / "memory").file
    assert streamed(pipeline, name, tmp_path / "streamed").read_bytes() == expected.read_bytes()


def test_no_weight_is_read_before_the_graph_is_written(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.onnx import trace
    from exporters.onnx.stored_weights import StoredWeight

    read: list[int] = []
    original, save = StoredWeight.read, trace.save_model

    def counted(self: StoredWeight) -> np.ndarray:
        read.append(int(np.prod(self.shape)))
        return original(self)

    def saved(model: ir.Model, file: Path) -> Path | None:
        assert max(read, default=0) <= 8192  # what constant folding may look at
        return save(model, file)

    monkeypatch.setattr(StoredWeight, "read", counted)
    monkeypatch.setattr(trace, "save_model", saved)
    monkeypatch.setattr(trace, "EXTERNAL_ABOVE_BYTES", 1000)
    streamed(pipeline, "vae_decoder", tmp_path)
    assert max(read) > 8192 // 4


def test_a_parameter_read_in_part_is_refused(exported: Callable[[str], Path]) -> None:
    import torch

    from exporters.onnx.stored_weights import StoredWeight
    from exporters.onnx.streaming import attach_weights

    whole = torch.empty(4, 4)
    model = ir.load(exported("text_encoder"))
    value = next(iter(model.graph.initializers.values()))
    value.const_value = ir.tensor(whole[:2])
    stored = {whole.data_ptr(): StoredWeight(Path("w.safetensors"), 0, np.float32, (4, 4))}
    with pytest.raises(DeployError, match="read in part"):
        attach_weights(model, stored)


def test_a_dtype_that_cannot_be_read_is_refused(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.onnx import streaming

    monkeypatch.setattr(streaming, "_DTYPES", {})
    with pytest.raises(InputError, match="stored as F32, which cannot be read"):
        streaming.unread_module(pipeline / "text_encoder", "transformers", "CLIPTextModel")


def test_external_weights_are_read_piece_by_piece(exported: Callable[[str], Path], tmp_path: Path) -> None:
    from exporters.onnx.stored_weights import unmap

    model = ir.load(exported("text_encoder"))
    before = {name: array_of(value) for name, value in model.graph.initializers.items()}
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    loaded = ir.load(tmp_path / "model.onnx")
    unmap(loaded)
    for name, value in loaded.graph.initializers.items():
        assert not isinstance(value.const_value, ir.ExternalTensor)
        assert np.array_equal(array_of(value), before[name])


def array_of(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
