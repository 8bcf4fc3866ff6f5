"""Every component as ONNX equals PyTorch at sizes that were never traced, and comes out the same twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporters.families import family_of
from exporters.families.open_source import open_source
from runtimes.errors import InputError
from tests.exporters.exporting import (
    component_module,
    export_component,
    feeds_for,
    relative_l2,
    run_onnx,
    run_torch,
)
from tests.exporters.pipelines import write_pipeline

NAMES = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
# batch, latent rows and columns in multiples, tokens; traced: (2, 2, 3, 7)
SHAPES = ((2, 2, 3, 7), (1, 1, 1, 1), (3, 4, 2, 20), (1, 2, 5, 6))


@pytest.mark.parametrize("name", NAMES)
def test_equals_torch_at_traced_and_untraced_shapes(name: str, pristine: Path, exported: Callable[[str], Path]) -> None:
    source = open_source(pristine)
    spec = family_of(source.pipeline_class).components(source, {})[name]
    module = component_module(source, spec)
    for shape in SHAPES:
        feeds = feeds_for(spec, *shape)
        assert relative_l2(run_onnx(exported(name), feeds), run_torch(module, feeds)) < 1e-5, shape


def test_a_unet_whose_own_size_is_not_halved_evenly_is_exported_for_every_size(tmp_path: Path) -> None:
    """Three levels, so that both doublings differ: 9 -> 5 -> 3 -> 5 -> 9, where 2 x 3 would be 6."""
    blocks = {"sample_size": 9, "block_out_channels": (16, 32, 32), "layers_per_block": 1,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")}
    source = open_source(write_pipeline(tmp_path / "model", unet=blocks))
    spec = family_of(source.pipeline_class).components(source, {})["unet"]
    module, file = component_module(source, spec), export_component(source, "unet", tmp_path / "out").file
    for rows, columns in ((9, 9), (9, 13), (8, 12), (5, 6), (64, 33)):
        feeds = feeds_for(spec, 2, rows, columns, 7)
        assert feeds["sample"].shape == (2, 4, rows, columns)
        assert relative_l2(run_onnx(file, feeds), run_torch(module, feeds)) < 1e-5, (rows, columns)
    assert module.model.num_upsamplers == 2, "the network is as it was"


@pytest.mark.parametrize("name", NAMES)
def test_graph_has_the_names_and_axes_of_the_spec(name: str, pristine: Path, exported: Callable[[str], Path]) -> None:
    source = open_source(pristine)
    spec = family_of(source.pipeline_class).components(source, {})[name]
    graph = onnx.load(exported(name)).graph
    found = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
             for v in (*graph.input, *graph.output)]
    assert found == [(t.name, t.shape) for t in (*spec.inputs, *spec.outputs)]


def test_weights_keep_the_names_of_the_source(pristine: Path, exported: Callable[[str], Path]) -> None:
    held = {i.name.removesuffix(".T") for i in onnx.load(exported("unet")).graph.initializer}
    keys = set(open_source(pristine).components["unet"].headers())
    assert not {key for key in keys - held if key.endswith(("conv1.weight", "conv_in.bias", "to_q.weight"))}


def test_same_module_gives_same_bytes_without_local_paths(
    pristine: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    again = export_component(open_source(pristine), "vae_decoder", tmp_path).file
    assert again.read_bytes() == exported("vae_decoder").read_bytes()
    for word in (b"site-packages", b"/work", b".py", b"torch.onnx"):
        assert word not in again.read_bytes()


def test_attention_is_five_plain_nodes(exported: Callable[[str], Path]) -> None:
    operators = [n.op_type for n in onnx.load(exported("text_encoder")).graph.node]
    assert operators.count("Softmax") == 2
    assert "IsNaN" not in operators


def test_other_architecture(tmp_path: Path) -> None:
    """Linear projections, fp32 attention, other levels, eight latent channels, no quant_conv, a wider text encoder."""
    source = open_source(write_pipeline(
        tmp_path / "model", latent_channels=8, context=40,
        unet={"block_out_channels": (8, 16, 24), "use_linear_projection": True, "attention_head_dim": (1, 2, 3),
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 12,
              "up_block_types": ("UpBlock2D",) * 3, "upcast_attention": True},
        vae={"use_quant_conv": False, "use_post_quant_conv": False}))
    for name in ("unet", "vae_encoder"):
        spec = family_of(source.pipeline_class).components(source, {})[name]
        file = export_component(source, name, tmp_path / name).file
        feeds = feeds_for(spec, 1, 3, 1, 9)
        assert relative_l2(run_onnx(file, feeds), run_torch(component_module(source, spec), feeds)) < 1e-5


def test_operator_without_onnx_form_is_named(pristine: Path, tmp_path: Path) -> None:
    import torch

    class Unusual(torch.nn.Module):
        def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.linalg.qr(latent_sample)[0],)

    from exporters.onnx.trace import export_onnx

    source = open_source(pristine)
    spec = family_of(source.pipeline_class).components(source, {})["vae_decoder"]
    with pytest.raises(InputError, match=r"vae_decoder: the operator aten::linalg_qr.* cannot be exported"):
        export_onnx(Unusual().eval(), spec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_pytorch_cannot_run_is_bad_input(pristine: Path, tmp_path: Path) -> None:
    import torch

    class Broken(torch.nn.Module):
        def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.nn.Identity()(latent_sample, unknown=1),)

    from exporters.onnx.trace import export_onnx

    spec = family_of((source := open_source(pristine)).pipeline_class).components(source, {})["vae_decoder"]
    with pytest.raises(InputError, match=r"vae_decoder: PyTorch cannot run the network: TypeError: .*unknown"):
        export_onnx(Broken().eval(), spec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_is_silent(pristine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_component(open_source(pristine), "text_encoder", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_weights_above_the_limit_go_beside_the_graph(
    pristine: Path, exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.onnx import trace

    monkeypatch.setattr(trace, "EXTERNAL_ABOVE_BYTES", 1000)
    source = open_source(pristine)
    result = export_component(source, "text_encoder", tmp_path)
    assert result.data == tmp_path / "model.onnx.data"
    feeds = feeds_for(family_of(source.pipeline_class).components(source, {})["text_encoder"], 2, 1, 1, 5)
    assert (run_onnx(result.file, feeds) == run_onnx(exported("text_encoder"), feeds)).all()
