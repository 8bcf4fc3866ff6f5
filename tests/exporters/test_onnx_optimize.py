"""An optimized graph has fewer nodes, the same interface and the same results; plain targets get plain ONNX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporters.families import family_of
from exporters.families.open_source import open_source
from exporters.onnx.fusions import FUSIONS
from exporters.onnx.optimize_graph import FUSIONS_FOR, optimize_onnx
from runtimes.bundle.roles import Role
from runtimes.errors import BundleError
from tests.exporters.exporting import feeds_for, relative_l2, run_onnx

ROLES = {"text_encoder": Role.TEXT_ENCODER, "unet": Role.DENOISER, "vae_encoder": Role.IMAGE_ENCODER,
         "vae_decoder": Role.IMAGE_DECODER}
SHAPES = ((2, 2, 3, 7), (1, 1, 1, 1), (3, 4, 2, 20))
Exported = Callable[[str], Path]


def same_results(pristine: Path, name: str, one: Path, other: Path) -> None:
    source = open_source(pristine)
    spec = family_of(source.pipeline_class).components(source, {})[name]
    for shape in SHAPES:
        feeds = feeds_for(spec, *shape)
        assert relative_l2(run_onnx(other, feeds), run_onnx(one, feeds)) < 1e-5, shape


def interface(file: Path) -> list[str]:
    graph = onnx.load(file).graph
    return [str(value) for value in (*graph.input, *graph.output)]


@pytest.mark.parametrize("name", ROLES)
def test_same_interface_and_results_with_fewer_nodes(
    name: str, pristine: Path, exported: Exported, tmp_path: Path
) -> None:
    report = optimize_onnx(exported(name), tmp_path / "model.onnx", ROLES[name], "onnxruntime")
    assert all(report.fusions.values()), report.fusions
    before, after = report.to_json()["nodes"]
    assert after < before
    assert after == len(onnx.load(tmp_path / "model.onnx").graph.node)
    assert interface(tmp_path / "model.onnx") == interface(exported(name))
    same_results(pristine, name, exported(name), tmp_path / "model.onnx")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_fusion_keeps_the_results(fusion: str, pristine: Path, exported: Exported, tmp_path: Path) -> None:
    fusions = ("attention", fusion) if fusion == "self_attention" else (fusion,)
    report = optimize_onnx(exported("unet"), tmp_path / "model.onnx", Role.DENOISER, "onnxruntime", fusions=fusions)
    assert report.fusions[fusion] > 0
    same_results(pristine, "unet", exported("unet"), tmp_path / "model.onnx")


def test_fusions_together_keep_the_results_of_biased_causal_attention(
    pristine: Path, exported: Exported, tmp_path: Path
) -> None:
    report = optimize_onnx(exported("text_encoder"), tmp_path / "model.onnx", Role.TEXT_ENCODER, "onnxruntime",
                           fusions=("attention", "self_attention", "skip_layer_norm", "silu"))
    assert report.fusions == {"attention": 2, "self_attention": 2, "skip_layer_norm": 5, "silu": 2}
    same_results(pristine, "text_encoder", exported("text_encoder"), tmp_path / "model.onnx")


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "tensorrt-rtx"])
def test_other_targets_get_plain_onnx(target: str, exported: Exported, tmp_path: Path) -> None:
    optimize_onnx(exported("vae_decoder"), tmp_path / "model.onnx", Role.IMAGE_DECODER, target)
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


def test_same_graph_gives_the_same_bytes_and_report(exported: Exported, tmp_path: Path) -> None:
    reports = [optimize_onnx(exported("unet"), tmp_path / f"{i}.onnx", Role.DENOISER, "onnxruntime") for i in range(2)]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    assert json.dumps(reports[0].to_json()) == json.dumps(reports[1].to_json())


def test_node_names_are_unique_and_tell_the_module(exported: Exported, tmp_path: Path) -> None:
    optimize_onnx(exported("unet"), tmp_path / "model.onnx", Role.DENOISER, "onnxruntime")
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1/MultiHeadAttention" in names


def test_source_is_left_as_it_was(exported: Exported, tmp_path: Path) -> None:
    before = exported("vae_encoder").read_bytes()
    optimize_onnx(exported("vae_encoder"), tmp_path / "model.onnx", Role.IMAGE_ENCODER, "onnxruntime")
    assert exported("vae_encoder").read_bytes() == before


def test_file_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xffnot a model")
    with pytest.raises(BundleError, match="not an ONNX model"):
        optimize_onnx(tmp_path / "bad.onnx", tmp_path / "model.onnx", Role.DENOISER, "onnxruntime")


def test_table_names_known_fusions() -> None:
    assert {f for table in FUSIONS_FOR.values() for fusions in table.values() for f in fusions} <= set(FUSIONS)


def test_measurement_compares_variants(exported: Exported, pristine: Path, tmp_path: Path) -> None:
    from exporters.measure.fusion_speed import measure, table, variants_of

    source = open_source(pristine)
    spec = family_of(source.pipeline_class).components(source, {})["vae_encoder"]
    variants = variants_of(Role.IMAGE_ENCODER, exported("vae_encoder"), tmp_path)
    rows = measure(list(variants), feeds_for(spec, 1, 1, 1, 1), 2)
    names = [row.name for row in rows]
    assert names[0] == "as exported"
    assert {"attention", "channel_affine", "the table's choice", "onnxruntime.transformers"} <= set(names)
    assert "join_time_projections" not in names  # it changes nothing here
    assert all(row.relative_l2 < 1e-5 for row in rows)
    assert "| as exported |" in table("vae_encoder", rows)
