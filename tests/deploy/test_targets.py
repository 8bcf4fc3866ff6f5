"""`build` for every target and precision on a small model: what is built, what is proven, what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec, Precision
from runtimes.bundle.details import EngineDetails
from runtimes.bundle.folder import Bundle
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import UnavailableError
from tests.deploy.conftest import Cli, assert_refused

COMPONENTS = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


@pytest.fixture(scope="module")
def engines(tiny_model: Path, build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    spec = BuildSpec(model=str(tiny_model), target="tensorrt")
    return run_build(spec, tmp_path_factory.mktemp("engines") / "b", cache_root=build_cache).bundle


def test_engines_of_all_components_are_built_without_a_gpu(engines: Bundle):
    assert sorted(engines.manifest.components) == COMPONENTS
    for component in engines.manifest.components.values():
        file = engines.file(component.file)
        assert file.read_bytes()[:4] == b"vtrt"
        assert file.stat().st_size > component.parameters, "weights are inside, at 2 bytes each less what is folded"
        assert {"SM75", "SM89", "SM120", "SM121"} <= set(component.details_as(EngineDetails).compute_capabilities)
        assert not component.details_as(EngineDetails).refused_capabilities
        assert component.precision == "fp16"


def test_the_compiled_graphs_are_proven_and_the_engines_are_said_not_to_be(engines: Bundle, cli: Cli):
    parity = engines.manifest.parity
    assert parity is not None and not parity["ok"] and not parity["broken"]
    assert sorted(text.partition(":")[0] for text in parity["unverified"]) == COMPONENTS
    assert sorted(parity["components"]) == COMPONENTS
    assert all(1e-6 < c["relative_l2"] < 1e-2 for c in parity["components"].values()), "rounding to 16 bits shows"
    assert parity["images"]["count"] > 0
    shown = cli("inspect", engines.path)
    assert "engine not executed here" in shown.out and "SM89" in shown.out


def test_engines_without_a_driver_are_one_clear_line(engines: Bundle, cli: Cli, tmp_path: Path):
    result = cli("generate", engines.path, "a cat", "-o", tmp_path / "cat.png")
    assert_refused(result, "no usable NVIDIA driver", code=4)
    verified = cli("verify", engines.path, "--json")
    assert verified.code == 4
    assert len(json.loads(verified.out)["unverified"]) >= 4


def test_openvino_generates_what_onnxruntime_does_in_every_mode(tiny_model: Path, build_cache: Path, tmp_path: Path):
    specs = [BuildSpec(model=str(tiny_model), target=target) for target in ("onnxruntime", "openvino")]
    bundles = [run_build(spec, tmp_path / spec.target, cache_root=build_cache).bundle for spec in specs]
    assert {c.format for c in bundles[1].manifest.components.values()} == {"openvino"}
    assert bundles[1].manifest.parity is not None and bundles[1].manifest.parity["ok"]
    pipelines = [runtimes.load(bundle.path) for bundle in bundles]
    height, width = pipelines[0].roles.codec.height, pipelines[0].roles.codec.width
    image = np.random.default_rng(0).random((height, width, 3), np.float32)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2:] = 255
    modes: list[dict[str, Any]] = [{}, {"negative_prompt": "blue"}, {"image": image, "strength": 0.7},
                                   {"image": image, "mask": mask}, {"guidance_rescale": 0.7, "weighting": True}]
    for options in modes:
        a, b = (pipeline("a (cat:1.2)", steps=3, seed=1, output="numpy", **options) for pipeline in pipelines)
        np.testing.assert_allclose(a, b, atol=1e-3, err_msg=str(options))


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_16_bit_storage_saves_bytes_and_keeps_float32_arithmetic(tiny_model: Path, build_cache: Path, tmp_path: Path,
                                                                 low: Precision):
    full, half = (run_build(BuildSpec(model=str(tiny_model), precision=precision), tmp_path / precision,
                            cache_root=build_cache).bundle for precision in ("fp32", low))
    for name, component in half.manifest.components.items():
        assert component.precision == low
        saved = full.component(name).bytes - component.bytes
        assert saved > 0.8 * component.parameters, f"{name}: 2 bytes a weight, less new casts and what stays float32"
    assert half.manifest.parity is not None and half.manifest.parity["ok"]
    assert len(runtimes.load(half.path)("a cat", steps=2)) == 1


def test_a_missing_builder_stops_the_build_before_any_work(tiny_model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("exporters.tensorrt.engine_builder.installed", lambda builder: False)
    with pytest.raises(UnavailableError, match="no TensorRT builder is installed"):
        run_build(BuildSpec(model=str(tiny_model), target="tensorrt"), tmp_path / "b", cache_root=tmp_path / "cache")
    assert not (tmp_path / "b").exists() and not (tmp_path / "cache" / "passes").exists()


def test_int8_engines_hold_quantizers_that_break_no_attention(tiny_model: Path, build_cache: Path, tmp_path: Path):
    profiles = ({"batch": ShapeRange(1, 1, 1)}, {"batch": ShapeRange(2, 2, 4)})
    spec = BuildSpec(model=str(tiny_model), target="tensorrt-rtx", precision="int8", calibration_samples=8,
                     engine={"capabilities": "SM89"}, profiles=profiles)
    manifest = run_build(spec, tmp_path / "b", cache_root=build_cache).bundle.manifest
    unet = manifest.components["unet"]
    engine = unet.details_as(EngineDetails)
    assert unet.precision == "int8" and engine.compute_capabilities == ("SM89",)
    assert engine.quantizers is not None and engine.quantizers.inputs["Conv"] > 0
    assert engine.quantizers.attentions > 0 and not engine.quantizers.broken_attentions
    assert [profile["timestep"] for profile in engine.profiles] == [((1,), (2,), (2,)), ((2,), (4,), (8,))]
    assert manifest.parity is not None and not manifest.parity["broken"]
