"""`bench` and `--target auto`: what is measured is really run, in turns, and equal images are said to be equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.bench.contest import BenchOptions, run_bench
from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec
from runtimes.bundle.folder import Bundle
from runtimes.errors import InputError
from runtimes.system.cache_root import rooted
from runtimes.system.progress import listening
from tests.deploy.conftest import Cli, assert_refused
from tests.heard import Heard


@pytest.fixture(scope="module")
def bundles(tiny_model: Path, build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bench")
    return [run_build(BuildSpec(model=str(tiny_model), precision=precision), folder / precision,
                      cache_root=build_cache).bundle.path for precision in ("fp32", "fp16")]


def test_a_bundle_and_pytorch_generate_the_same_image_in_turns(reference_bundle: Path):
    heard = Heard()
    options = BenchOptions(("torch",), rounds=2, steps=2, batches=(1, 2), threads=1)
    with listening(heard):
        report = run_bench([reference_bundle], options)
    assert [run["name"] for run in report["runs"]] == ["bundle", "torch"]
    assert set(report["ratios"]) == {"torch"}
    for run in report["runs"]:
        assert 0 < run["seconds"]["min"] <= run["seconds"]["median"] <= run["seconds"]["max"]
        assert run["cold_start_seconds"] > run["seconds"]["min"]
        assert run["psnr_db"] > 40, f"{run['name']} drew another image"
        assert set(run["components"]) == {"text_encoder", "unet", "vae_decoder", "python"}
        assert sum(part["share"] for part in run["components"].values()) == pytest.approx(1)
    rss = {run["name"]: run["peak_rss_bytes"] for run in report["runs"]}
    assert rss["bundle"] < rss["torch"], "a bundle's process holds no torch"
    assert [entry["batch"] for entry in report["batches"]] == [1, 2]
    macs = Bundle.open(reference_bundle).component("unet").graph.macs or 0
    unet = report["runs"][0]
    assert unet["limits"]["unet_gflops"] == pytest.approx(2 * macs * 2 / unet["components"]["unet"]["seconds"] / 1e9)
    assert len([line for line in heard.said if line.startswith("round")]) == 2


def test_bad_options_are_refused_before_anything_runs(bundles: list[Path], cli: Cli):
    with pytest.raises(InputError, match="cannot compare with 'jax'"):
        BenchOptions(against=("jax",))
    assert_refused(cli("bench", bundles[0], "--batch", "a"), "not a list of whole numbers")
    refused = cli("bench", bundles[0], "--rounds", "0")
    assert refused.code == 2 and "greater than or equal to 1" in refused.err
    assert_refused(cli("bench", "nowhere"), "nowhere")


def test_bench_json_is_one_object(bundles: list[Path], cli: Cli):
    result = cli("bench", *bundles, "--rounds", "1", "--steps", "1", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert {"machine", "runs", "ratios", "limits"} <= set(report)
    assert [run["name"] for run in report["runs"]] == ["fp32", "fp16"] and set(report["ratios"]) == {"fp16"}


def test_auto_takes_the_runtime_that_measured_faster(tiny_model: Path, build_cache: Path, tmp_path: Path, monkeypatch):
    spec = BuildSpec(model=str(tiny_model), target="auto")
    monkeypatch.setattr("deploy.building.choose_target._measured", lambda *_: {"onnxruntime": 0.02, "openvino": 0.01})
    assert run_build(spec, tmp_path / "b", cache_root=build_cache).bundle.manifest.target == "openvino"
    monkeypatch.setattr("deploy.building.choose_target._measured", lambda *_: pytest.fail("measured again"))
    assert run_build(spec, tmp_path / "b", cache_root=build_cache).up_to_date


def test_auto_measures_every_runtime_that_is_installed(tiny_model: Path, build_cache: Path):
    from deploy.building.choose_target import _measured

    with rooted(build_cache):
        found = _measured(BuildSpec(model=str(tiny_model)), ["onnxruntime", "openvino"])
    assert sorted(found) == ["onnxruntime", "openvino"]
    assert all(seconds > 0 for seconds in found.values())


def test_a_dry_run_of_auto_says_that_it_measures_nothing(cli: Cli, tiny_model: Path):
    assert_refused(cli("build", tiny_model, "--target", "auto", "--dry-run"), "decided by measuring")
