"""The report page: self-contained, and its figures are those of the manifest."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from deploy.core.spec import BuildSpec, covering, make_spec
from deploy.report.charts import Axis, Point, Series, chart
from deploy.report.page import Image, amplified_difference, grouped, report_bundles, reproduction, write_report
from deploy.report.sections import (
    Section,
    conversions,
    drift_chart,
    front,
    image_rows,
    layer_maps,
    pass_rows,
    read_metrics,
)
from runtimes.bundle.details import Conversion, GraphDetails, Quantization
from runtimes.bundle.folder import Bundle, records_below, write_manifest
from runtimes.bundle.manifest import to_json
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import BundleError, InputError
from tests.deploy.browser import CHROMIUM, Browser
from tests.deploy.conftest import Cli, assert_refused
from tests.deploy.test_plan_and_cache import make_bundle

PROFILES = ({"batch": ShapeRange(1, 1, 1)}, {"batch": ShapeRange(2, 2, 4)})
LAYERS = {
    "precision_map": {"conv_in/Conv": "float", "mid.conv1/Conv": "w8a8", "mid.conv2/Conv": "w8"},
    "errors": {"mid.conv1/Conv": {"w8a8": 0.02, "w8": 0.001}, "mid.conv2/Conv": {"w8a8": 0.25, "w8": 0.004}},
    "drift": {"moves": [[0, -1.0, 1.0], [9, -4.0, 2.0]], "stays": [[0, -1.0, 1.0], [9, -1.0, 1.0]]},
}
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")


def write_bundle(folder: Path, psnr_db: float = 57.25, unet: str = "weights", images: int = 2) -> Bundle:
    """A finished bundle with a quantized U-Net and a report."""
    manifest = make_bundle(folder, unet=unet).manifest
    (folder / "components" / "unet" / "quantization.json").write_text(json.dumps(LAYERS))
    component = dataclasses.replace(
        manifest.components["unet"], files=records_below(folder / "components" / "unet", folder),
        format="onnx", details=GraphDetails(quantization=Quantization(
            recipe="auto", layers={"float": 1, "w8": 1, "w8a8": 1}, scheme={}, parameters={}, weight_bytes=(4, 1))),
        parity={"relative_l2": 2.5e-6, "max_abs": 1e-5, "cosine": 0.99999, "nonfinite": 0, "shapes": [[2, 4, 8, 8]]})
    parity: dict[str, Any] = {
        "images": {"psnr_db": psnr_db, "ssim": 0.9991, "count": images}, "retrieval": None, "unverified": [],
        "trajectory": {"relative_l2": [1e-6, 1e-5], "by_scheduler": {"ddim": [1e-6, 1e-5]}}}
    measured = {"passes": [
        {"name": "load", "seconds": 1.5, "peak_rss_bytes": 100_000_000, "bytes_in": 9, "bytes_out": 7,
         "reused": 0, "components": {}},
        {"name": "quantize", "seconds": 2.5, "peak_rss_bytes": 200_000_000, "bytes_in": 7, "bytes_out": 3,
         "reused": 0, "components": {}, "relative_l2": {"unet": 2.5e-6, "vae_decoder": 1e-7}}]}
    manifest = dataclasses.replace(manifest, components={"unet": component}, parity=parity, measured=measured,
                                   verified=True)
    white, grey = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8, 3), 198, np.uint8)
    write_report(folder / "report", manifest, [Image(f"a <b>cat</b> {i}", "ddim", white, grey, psnr_db + i, 0.99)
                                               for i in range(images)])
    report = records_below(folder / "report", folder)
    write_manifest(folder, dataclasses.replace(manifest, measured={**measured, "files": to_json(report)}))
    return Bundle.open(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "small")


def test_the_page_needs_no_network_and_shows_the_figures(bundle: Bundle):
    page = (bundle.path / "report" / "report.html").read_text()
    assert not re.search(r"""((src|href)=["'](?!data:|#)|url\((?!data:)|https?://)""", page)
    assert "57.2 dB" in page and "2.5e-06" in page and "verified" in page and "relative L2 ≤" in page
    assert "<b>cat</b>" not in page, "prompts are escaped"
    metrics = json.loads((bundle.path / "report" / "metrics.json").read_text())
    assert metrics["parity"]["images"]["psnr_db"] == 57.25
    assert metrics["pictures"][1] == {"prompt": "a <b>cat</b> 1", "scheduler": "ddim", "psnr_db": 58.25, "ssim": 0.99}
    assert sorted(p.name for p in (bundle.path / "report" / "images").iterdir()) == [
        f"{i:02d}-{kind}.png" for i in range(2) for kind in ("bundle", "difference", "reference")]


def test_a_pass_from_the_cache_shows_what_it_once_cost(bundle: Bundle):
    once = {"unet": {"seconds": 9.0, "peak_rss_bytes": 3e8}, "vae": {"seconds": 1.0, "peak_rss_bytes": 4e8}}
    cost = {"name": "export", "seconds": 0.1, "peak_rss_bytes": 6e7, "bytes_out": 7, "reused": 2, "components": once}
    for told, seconds, peak in ({}, 0.1, 6e7), ({"seconds_without_cache": 10.0}, 10.0, 4e8):
        manifest = dataclasses.replace(bundle.manifest, measured={"passes": [{**cost, **told}]})
        (row,) = pass_rows(manifest)
        assert (row["seconds"], row["peak_rss_bytes"]) == (seconds, peak)


def test_differences_are_amplified_and_saturate():
    reference, candidate = np.zeros((1, 2, 3), np.uint8), np.array([[[1, 1, 1], [99, 99, 99]]], np.uint8)
    assert amplified_difference(reference, candidate).tolist() == [[[10, 10, 10], [255, 255, 255]]]


def test_a_drift_of_equal_values_still_has_a_scale():
    svg = ElementTree.fromstring(drift_chart({"trajectory": {"relative_l2": [1e-6, 1e-6, 1e-6]}}))
    dots = svg.findall("circle")
    assert len(dots) == 3 and len({dot.get("cy") for dot in dots}) == 1
    assert [dot.findtext("title") for dot in dots][2] == "worst, step 3: 1.00e-06"


def test_a_chart_places_larger_values_higher_and_leaves_out_what_is_not_finite():
    points = (Point(1, 1e-6, "low"), Point(2, 1e-2, "high"), Point(3, float("nan"), "lost"), Point(4, 0.0, "zero"))
    svg = ElementTree.fromstring(chart([Series("a", points)], Axis("x"), Axis("y", log=True)))
    heights = {dot.get("data-tip"): float(dot.get("cy", "nan")) for dot in svg.findall("circle")}
    assert heights.keys() == {"low", "high"} and heights["high"] < heights["low"]
    assert chart([Series("a", ())], Axis("x"), Axis("y")) == ""


def test_the_front_holds_what_no_other_beats_at_both():
    assert front([(10, 30), (20, 40), (20, 35), (30, 40), (10, 30)]) == {0, 1, 4}


def test_layers_are_shown_with_their_precision_the_costliest_first_and_the_ranges_that_move(bundle: Bundle):
    (unet,) = layer_maps(Section("small", bundle.path, bundle.manifest, {}))
    assert [layer["precision"] for layer in unet["layers"]] == ["float", "w8a8", "w8"]
    assert [row["layer"] for row in unet["costly"]] == ["mid.conv2/Conv", "mid.conv1/Conv"]
    assert "moves ×4.0" in unet["ranges"] and unet["ranges"].index("moves") < unet["ranges"].index("stays")


def test_images_beyond_the_budget_are_left_out_the_most_equal_first(tmp_path: Path):
    bundle = write_bundle(tmp_path / "many", images=8)
    section = Section("many", bundle.path, bundle.manifest, read_metrics(bundle.path))
    whole, count = image_rows(section, 1 << 20)
    spent = sum(len(row["reference"]) + len(row["bundle"]) for row in whole)
    part, _ = image_rows(section, spent // 2)
    assert count == len(whole) == 8 and [row["number"] for row in part] == [0, 1, 2, 3]


def test_large_images_are_shown_smaller_and_the_page_stays_below_5_mb(bundle: Bundle, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    shutil.rmtree(bundle.path / "report")
    write_report(bundle.path / "report", bundle.manifest, [Image("noise", "ddim", noise, noise, 99.0, 1.0)] * 8)
    page = (bundle.path / "report" / "report.html").read_text()
    assert len(page) < 5e6
    assert 1 <= page.count('class="trio"') < 8 and "of 8 images, the least equal" in page


def test_operators_in_16_bits_are_counted_with_the_reasons_of_the_others(bundle: Bundle):
    unet = bundle.manifest.components["unet"]
    details = GraphDetails(conversion=Conversion(
        precision="fp16", mode="compute", converted={"Conv": 56, "Gemm": 4}, float32={
            "softmax": {"Softmax": 20}, "normalization": {"LayerNormalization": 30, "InstanceNormalization": 3}},
        float32_nodes={}, casts=0, weight_bytes_before=4, weight_bytes_after=2))
    manifest = dataclasses.replace(bundle.manifest, components={"unet": dataclasses.replace(unet, details=details)})
    assert conversions(manifest) == [
        {"name": "unet", "converted": 60, "kept": 53, "reasons": "normalization 33, softmax 20"}]
    assert conversions(bundle.manifest) == []


def test_a_bundle_without_report_says_so(tmp_path: Path):
    make_bundle(tmp_path / "bare", unet="weights")
    missing = report_bundles([tmp_path / "bare"], tmp_path / "page.html")
    assert missing == ["bare has no report folder: it was built with --no-verify"]
    assert "no report folder" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_a_report_is_refused_and_nothing_is_left(cli: Cli, bundle: Bundle, tmp_path: Path):
    assert_refused(cli("report", tmp_path / "nowhere"), "nowhere")
    (tmp_path / "bench.json").write_text('{"runs": 3}')
    assert_refused(cli("report", bundle.path, "--bench", tmp_path / "bench.json"), "bench.json", "bench --json")
    with pytest.raises(InputError, match="folder"):
        report_bundles([bundle.path], tmp_path)
    (bundle.path / "report" / "metrics.json").chmod(0o644)
    (bundle.path / "report" / "metrics.json").write_text("{")
    with pytest.raises(BundleError, match=r"metrics\.json"):
        read_metrics(bundle.path)
    assert not list(Path.cwd().iterdir())


@in_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_slider_and_pointer_change_the_page_and_its_values_are_those_of_metrics_json(
        bundle: Bundle, tmp_path: Path, width: int):
    other = write_bundle(tmp_path / "other", psnr_db=31.0, unet="heavier weights")
    (tmp_path / "bench.json").write_text(json.dumps({"runs": [
        {"name": name, "seconds": {"median": s}} for name, s in (("small", 2.0), ("other", 1.0))]}))
    page = tmp_path / "page.html"
    assert report_bundles([bundle.path, other.path], page, tmp_path / "bench.json") == []
    with Browser(width, dark=width < 600) as browser:
        browser.open(page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing leaves the screen"
        found = json.loads(browser.evaluate(
            "JSON.stringify([...document.querySelectorAll('#b1 [data-metric]')].map(e => [e.dataset.metric, "
            "Number(e.dataset.value)]))"))
        metrics = json.loads((bundle.path / "report" / "metrics.json").read_text())
        unet = metrics["components"]["unet"]
        expected = {"bytes": unet["bytes"], "seconds": 2.0, "images.psnr_db": metrics["parity"]["images"]["psnr_db"],
                    "images.ssim": metrics["parity"]["images"]["ssim"], "components.unet.bytes": unet["bytes"],
                    "components.unet.relative_l2": unet["parity"]["relative_l2"],
                    "passes.quantize.relative_l2": metrics["measured"]["passes"][1]["relative_l2"]["unet"]}
        assert dict(found) == expected
        browser.point_at("circle[data-tip]")
        assert browser.evaluate("document.getElementById('tip').textContent").startswith("small: ")
        browser.point_at(".map i:nth-child(2)")
        assert browser.evaluate("document.getElementById('tip').textContent") == (
            "mid.conv1/Conv: 8-bit weights and activations; alone in w8a8 it is predicted to cost 2.0e-02, "
            "w8 it is predicted to cost 1.0e-03")
        browser.point_at("h3")
        assert browser.evaluate("document.getElementById('tip').textContent") == ""
        browser.evaluate("document.getElementById('amplify').focus()")
        browser.press("ArrowRight", 39)
        assert browser.evaluate("document.getElementById('amplified').textContent") == "×11"
        assert browser.evaluate("getComputedStyle(document.querySelector('.d')).filter") == "brightness(11)"
        assert browser.complaints == []


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
