"""The report page: self-contained, and its figures are those of the manifest."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from deploy.report import Picture, amplified_difference, drift_path, grouped, reproduction, write_report
from deploy.spec import BuildSpec, covering, make_spec
from runtimes.tensors import ShapeRange
from tests.deploy.test_plan_and_cache import make_bundle

PROFILES = ({"batch": ShapeRange(1, 1, 1)}, {"batch": ShapeRange(2, 2, 4)})
PARITY = {"relative_l2": 2.5e-6, "max_abs": 1e-5, "cosine": 0.99999, "nonfinite": 0, "shapes": [[2, 4, 8, 8]]}


def test_the_page_needs_no_network_and_shows_the_figures(tmp_path: Path):
    manifest = make_bundle(tmp_path / "bundle", unet="weights").manifest
    components = {"unet": dataclasses.replace(manifest.components["unet"], parity=PARITY)}
    parity = {"images": {"psnr_db": 57.25, "ssim": 0.9991, "count": 1}, "trajectory": {"relative_l2": [1e-6, 1e-5]},
              "retrieval": None, "unverified": []}
    measured = {"passes": [{"name": "load", "seconds": 1.5, "peak_rss_bytes": 1e8, "bytes_out": 7, "reused": 0}]}
    manifest = dataclasses.replace(manifest, components=components, parity=parity, measured=measured, verified=True)
    picture = np.full((8, 8, 3), 200, np.uint8)
    write_report(tmp_path / "report", manifest, [Picture("a <b>cat</b>", "ddim", picture, picture, 57.25, 0.9991)])
    page = (tmp_path / "report" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "57.2 dB" in page and "2.5e-06" in page and "verified" in page
    assert "<b>cat</b>" not in page, "prompts are escaped"
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["parity"]["images"]["psnr_db"] == 57.25
    assert sorted(p.name for p in (tmp_path / "report" / "images").iterdir()) == [
        "00-bundle.png", "00-difference.png", "00-reference.png"]


def test_differences_are_amplified_and_saturate():
    reference, candidate = np.zeros((1, 2, 3), np.uint8), np.array([[[1, 1, 1], [99, 99, 99]]], np.uint8)
    assert amplified_difference(reference, candidate).tolist() == [[[10, 10, 10], [255, 255, 255]]]


def test_a_drift_of_equal_values_still_has_a_scale():
    path = drift_path([1e-6, 1e-6, 1e-6])
    assert path is not None and path["high"] > path["low"]


def test_the_command_and_its_spec_make_the_same_build_again(tmp_path: Path):
    manifest = make_bundle(tmp_path / "bundle", unet="weights").manifest
    for spec in (BuildSpec(), BuildSpec(target="tensorrt", precision="int8", calibration_samples=16, keep=("Gemm",),
                                        shapes=covering(PROFILES), profiles=PROFILES)):
        built = dataclasses.replace(manifest, target=spec.target, precision=spec.precision, spec=spec.resolved())
        command, text = reproduction(built)
        (tmp_path / "build.yaml").write_text(text or "{}")
        words = command.split()
        options = {name: words[words.index(f"--{name}") + 1] for name in ("target", "precision")}
        assert make_spec(options, tmp_path / "build.yaml").resolved() == spec.resolved()
        assert ("--spec" in command) == bool(text)


def test_one_reason_of_several_components_is_said_once():
    assert grouped(["unet: no driver", "vae_decoder: no driver", "pipeline: slow"]) == [
        "unet, vae_decoder: no driver", "pipeline: slow"]
