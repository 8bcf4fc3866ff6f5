"""Memory budgets: the model that is fitted, what it decides, and that a real process stays below its budget."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import runtimes
from runtimes.backends.session import SessionOptions
from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.memory_budget import MARGIN, MemoryBudget, MemoryModel, fit
from runtimes.pipeline.memory_measurement import memory_model
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.device import Device
from tests.conftest import ROOT
from tests.runtimes.fakes import DDIM, FACTS, calls_of, fake_sessions, tokenize

MB = 1e6


def made(c: float, b: float, q: float) -> list[list[float]]:
    return [[rows, area, c + b * rows * area + q * rows * area**2]
            for rows, area in ((1, 16), (2, 16), (1, 256), (2, 256), (4, 256), (1, 1024))]


@pytest.mark.parametrize("costs", [(5 * MB, 1e4, 10.0), (0.0, 1e4, 0.0), (9 * MB, 0.0, 50.0)])
def test_what_calls_take_is_found_from_a_few(costs):
    model = fit({"base": 100 * MB, "denoiser": made(*costs), "decoder": made(0, 1e3, 0)})
    np.testing.assert_allclose(model.costs["denoiser"], costs, rtol=1e-6, atol=1)
    assert model.peak_bytes([{"denoiser": 16}], 1024) == pytest.approx(
        100 * MB + MARGIN * (costs[0] + costs[1] * 16 * 1024 + costs[2] * 16 * 1024**2))


def test_more_never_costs_less_whatever_was_measured():
    noisy = [[rows, area, growth + noise * MB] for (rows, area, growth), noise in
             zip(made(1 * MB, 1e3, 0), (0, 9, 8, 6, 4, 2), strict=True)]
    for points in (noisy, noisy[:1], noisy[:2]):
        model = fit({"base": 100 * MB, "denoiser": points, "decoder": points})
        peaks = [model.peak_bytes([{"denoiser": rows, "decoder": rows}], 64) for rows in (1, 2, 4, 8)]
        assert sorted(peaks) == peaks and peaks[0] >= 100 * MB


def test_calls_that_fit_into_freed_memory_do_not_flatten_the_slope():
    """Six calls below what loading had left free, then a straight line."""
    line = [[rows, area, max(3 * MB, 8e3 * rows * area - 13 * MB)] for rows, area in
            ((1, 16), (2, 16), (1, 64), (2, 64), (4, 64), (1, 1024), (2, 1024), (4, 1024), (8, 1024))]
    model = fit({"base": 100 * MB, "denoiser": line, "decoder": line})
    expected = 100 * MB + MARGIN * (8e3 * 65536 - 13 * MB)
    assert model.peak_bytes([{"denoiser": 64}], 1024) == pytest.approx(expected, rel=0.01)


def pipeline(megabytes: float) -> Pipeline:
    """One row of 64 latents costs 1 MB in the U-Net and 2 MB in the decoder."""
    model = MemoryModel(10 * MB, {"denoiser": (0, MB / 64, 0), "decoder": (0, 2 * MB / 64, 0)})
    return Pipeline(fake_sessions(), FACTS, DDIM, tokenize, memory=MemoryBudget(int(megabytes * MB), model))


@pytest.mark.parametrize(("megabytes", "guidance", "at_once"), [(100, 5.0, 4), (19.2, 5.0, 2), (14.8, 5.0, 1),
                                                               (14.8, 1.0, 1), (17, 1.0, 2)])
def test_as_many_images_share_a_call_as_fit(megabytes, guidance, at_once):
    made = pipeline(megabytes)
    options = {"seed": 0, "steps": 2, "guidance_scale": guidance, "output": "numpy"}
    result = made(list("abcd"), **options)
    assert {len(call["latent_sample"]) for call in calls_of(made, "vae_decoder")} == {at_once}
    assert {len(call["sample"]) for call in calls_of(made, "unet")} == {at_once * (2 if guidance > 1 else 1)}
    np.testing.assert_allclose(result, pipeline(100)(list("abcd"), **options), atol=1e-6)


def test_a_budget_that_holds_no_image_is_refused_before_any_network_runs():
    made = pipeline(13)
    with pytest.raises(InputError, match=r"needs about 14 MB, the budget is 13 MB.*smaller tiles"):
        made("a", seed=0, steps=2)
    assert not calls_of(made, "unet")
    assert made("a", seed=0, steps=1, height=64, width=64, tile=16, output="latents").shape[2:] == (16, 16)


@pytest.mark.parametrize(("text", "size"), [("800MB", 8e8), ("2.5GB", 2.5e9), ("2 GiB", 2**31), ("123456", 123456)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "memory budget") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "much", "1PB", "nanMB", "infGB"])
def test_no_size_is_refused(text):
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text, "memory budget")


def test_only_this_processs_memory_can_be_budgeted(reference_bundle):
    with pytest.raises(InputError, match="not that of cuda"):
        memory_model(runtimes.Bundle.open(reference_bundle), SessionOptions(Device("cuda")))


def test_a_process_stays_below_its_budget_and_is_measured_once(reference_bundle, tmp_path, monkeypatch):
    """Eight images of four times the pixels in two calls."""
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path))
    model = memory_model(runtimes.Bundle.open(reference_bundle), SessionOptions(threads=1, keep_graphs=True))
    budget = int(model.peak_bytes([{"denoiser": 8, "decoder": 4}], 256) + 0.5 * MB) + 24 * 8 * 128 * 128
    code = ("import sys, json, runtimes; from runtimes.system.process_memory import peak_rss_bytes\n"
            "seen = []\n"
            "pipeline = runtimes.load(sys.argv[1], threads=1, memory_budget=int(sys.argv[2]))\n"
            "decoder = pipeline.sessions['vae_decoder']; run = decoder.run\n"
            "decoder.run = lambda feeds: (seen.append(len(feeds['latent_sample'])), run(feeds))[1]\n"
            "pipeline(['a'] * 8, steps=1, seed=0, height=128, width=128)\n"
            "print(json.dumps([max(seen), peak_rss_bytes()]))")
    result = subprocess.run([sys.executable, "-c", code, str(reference_bundle), str(budget)], capture_output=True,
                            text=True, check=True, cwd=ROOT)
    at_once, peak = json.loads(result.stdout)
    assert at_once == 4 and len(list((tmp_path / "memory").glob("*.json"))) == 1
    assert 0.7 * budget < peak <= 1.05 * budget, (peak, budget)
