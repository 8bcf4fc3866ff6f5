"""Bundles whose denoiser is taken apart: equal to those in one piece, alone and in company, for every kind of model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from deploy.building.run_build import run_build
from deploy.core.plan import Skip, Step, load_passes
from deploy.core.spec import BuildSpec, make_spec
from deploy.core.whole_denoiser import open_whole
from deploy.passes import PASSES
from deploy.passes.hoist import Hoist
from runtimes import Request
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import PER_PROMPT, PER_REQUEST, PER_STEP, SHALLOW_ENTRY
from runtimes.bundle.tensors import example_feeds
from runtimes.pipeline.bundle_sessions import BundleSessions, open_session
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.loading import load_tokenizers, scheduler_config
from tests.exporters.family_pipelines import write_pipeline_of

SHAPES = {"batch": "1:1:4", "height": "32:32:64", "width": "32:32:64"}
Build = Callable[..., Bundle]
SLOW = pytest.mark.slow
KINDS = {"sd2": {PER_PROMPT, PER_STEP}, "xl": {PER_PROMPT, PER_REQUEST}, "ldm": {PER_STEP}}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, build_cache: Path) -> Build:
    """A small pipeline of a family as a bundle, each once."""
    folder, made = tmp_path_factory.mktemp("hoisting"), dict[str, Bundle]()

    def bundle(family: str, **options: Any) -> Bundle:
        options = {"hoist": True, **options}
        key = "-".join([family, *(f"{k}={v}" for k, v in sorted(options.items()))])
        if not (folder / family).exists():
            write_pipeline_of(family, folder / family)
        if key not in made:
            spec = make_spec({"model": str(folder / family), "shapes": SHAPES, "verify": "no", **options})
            made[key] = run_build(spec, folder / f"bundle-{len(made)}", cache_root=build_cache).bundle
        return made[key]

    return bundle


def latents(bundle: Bundle, prompts: str | list[str] = "a b", **fields: Any) -> np.ndarray[Any, Any]:
    fields = {"steps": 3, "seed": 1, "output": "latents", **fields}
    found: np.ndarray[Any, Any] = runtimes.load(bundle)(prompts, **fields)
    return found


def assert_close(pair: list[np.ndarray[Any, Any]], within: float = 1e-5) -> None:
    np.testing.assert_allclose(pair[0], pair[1], rtol=within, atol=within)


@pytest.mark.parametrize("family", ["sd2", pytest.param("xl", marks=SLOW), pytest.param("ldm", marks=SLOW)])
def test_the_same_bits_as_in_one_piece(build: Build, family: str):
    """On this machine: a product may round otherwise with another number of rows, so 1e-5 is what is promised."""
    apart, whole = build(family), build(family, hoist=False)
    assert set(apart.manifest.pipeline.denoiser.beforehand) == KINDS[family]
    assert not whole.manifest.pipeline.denoiser.entries
    unet = apart.component("unet")
    assert unet.parameters < whole.component("unet").parameters and "timestep" not in {s.name for s in unet.inputs}
    prompts = ["a b", "c"] if apart.manifest.pipeline.encoders else ["", ""]
    for scheduler in ("ddim", "euler-ancestral", "heun"):
        pair = [latents(bundle, prompts, scheduler=scheduler, seed=[1, 2]) for bundle in (apart, whole)]
        assert_close(pair)


@SLOW
def test_parity_is_that_of_the_parts_together(build: Build):
    bundle = build("xl", verify="components")
    parity = bundle.component("unet").parity
    assert parity is not None and parity["relative_l2"] < 1e-5
    assert bundle.manifest.verified and bundle.component("unet_per_request").parity is None


@SLOW
def test_the_whole_denoiser_takes_what_the_source_takes(build: Build):
    apart, whole = build("xl"), build("xl", hoist=False)
    with open_whole(apart, "unet", SessionOptions()) as one, open_session(whole, "unet", SessionOptions()) as other:
        assert [spec.name for spec in one.component.inputs] == [spec.name for spec in other.component.inputs]
        feeds = example_feeds(one.component.inputs, {n: a.range.opt for n, a in one.component.axes.items()})
        np.testing.assert_allclose(one.run(feeds)["out_sample"], other.run(feeds)["out_sample"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd2", pytest.param("xl", marks=SLOW)])
def test_jobs_of_any_kind_advanced_together_equal_lone_runs(build: Build, family: str):
    """Other prompts, steps, samplers, guidance and numbers of images: each row its own timestep and values."""
    pipeline = runtimes.load(build(family), deterministic=True)
    requests = [
        Request("a b", steps=4, seed=1, output="latents", scheduler="euler"),
        Request(["c", "d e"], steps=3, seed=5, output="latents", scheduler="ddim", guidance_scale=3.0),
        Request("a b", steps=5, seed=9, output="latents", scheduler="dpm++", negative_prompt="z"),
        Request("q", steps=2, seed=3, output="latents", guidance_scale=1.0),
    ]
    lone = [pipeline(request) for request in requests]
    jobs = pipeline.prepare(requests)
    while not all(job.done for job in jobs):
        pipeline.advance(jobs)
    for job, expected, found in zip(jobs, lone, pipeline.finish(jobs), strict=True):
        assert job.error is None
        np.testing.assert_array_equal(found, expected)


@SLOW
def test_large_images_in_tiles(build: Build):
    pair = [latents(build("xl", hoist=hoist), height=96, width=80, tile=64) for hoist in (True, False)]
    assert_close(pair)


@SLOW
def test_both_entries_of_a_step_cache_take_the_values(build: Build):
    apart, whole = (build("sd2", step_cache=True, hoist=hoist) for hoist in (True, False))
    entries = apart.manifest.pipeline.denoiser.entries
    assert set(entries) == {SHALLOW_ENTRY, PER_PROMPT, PER_STEP}
    shallow = apart.component(entries[SHALLOW_ENTRY].component)
    given = {name for entry in (entries[PER_PROMPT], entries[PER_STEP]) for name in entry.features}
    assert len(given & {spec.name for spec in shallow.inputs}) == 3, "a time projection, keys and values"
    assert not {"timestep", "encoder_hidden_states"} & {spec.name for spec in shallow.inputs}
    pair = [latents(bundle, steps=4, cache_interval=2) for bundle in (apart, whole)]
    assert_close(pair)


@pytest.mark.slow
def test_integers_of_the_step_graph_beside_float32_of_what_runs_beforehand(build: Build):
    bundle, exact = build("sd2", precision="int8", calibration_samples=16), build("sd2")
    assert bundle.component("unet").precision == "int8"
    assert {bundle.component(f"unet_{part}").precision for part in ("per_prompt", "per_step")} == {"fp32"}
    error, whole_error = (np.linalg.norm(latents(of) - latents(exact)) for of in (
        bundle, build("sd2", precision="int8", calibration_samples=16, hoist=False)))
    assert 0 < error <= 1.5 * whole_error


@pytest.mark.slow
def test_openvino(build: Build):
    pytest.importorskip("openvino")
    pair = [latents(build("sd2", target="openvino", hoist=hoist)) for hoist in (True, False)]
    assert_close(pair, 1e-4)


def assembled(bundle: Bundle, release: bool) -> tuple[Pipeline, BundleSessions]:
    """A pipeline that loads what it asks for, and its sessions."""
    sessions = BundleSessions(bundle, SessionOptions())
    pipeline = Pipeline(sessions, bundle.manifest.pipeline, scheduler_config(bundle), *load_tokenizers(bundle),
                        release=sessions.release if release else None)
    return pipeline, sessions


def loaded(sessions: BundleSessions) -> set[str]:
    return set(sessions._loaded)


def test_a_prompt_and_a_schedule_are_computed_once(build: Build, monkeypatch: pytest.MonkeyPatch):
    from runtimes.hoisted import beforehand

    runs: list[str] = []
    computed = beforehand._computed

    def noted(session: Session, feeds: Any) -> Any:
        runs.append(session.name)
        return computed(session, feeds)

    monkeypatch.setattr(beforehand, "_computed", noted)
    pipeline, _ = assembled(build("sd2"), release=False)
    pipeline("a b", steps=3, seed=0, output="latents")
    assert sorted(runs) == ["unet_per_prompt", "unet_per_prompt", "unet_per_step"], "prompt, negative prompt, schedule"
    pipeline("a b", steps=3, seed=1, output="latents")
    assert len(runs) == 3
    pipeline("c", steps=4, seed=1, output="latents")
    assert sorted(runs[3:]) == ["unet_per_prompt", "unet_per_step"]


@SLOW
def test_where_memory_is_short_their_weights_are_given_back(build: Build):
    bundle = build("xl")
    pipeline, sessions = assembled(bundle, release=True)
    image = pipeline("a b", steps=2, seed=0, output="latents")
    assert {"unet", "text_encoder"} <= loaded(sessions) and not {
        "unet_per_prompt", "unet_per_request"} & loaded(sessions)
    again, other = assembled(bundle, release=False)
    np.testing.assert_array_equal(again("a b", steps=2, seed=0, output="latents"), image)
    assert {"unet_per_prompt", "unet_per_request"} <= loaded(other)


def test_the_plan_waits_for_the_graph(build: Build):
    manifest = build("sd2", hoist=False).manifest
    assert isinstance(Hoist().plan(manifest, BuildSpec(hoist=False)), Skip)
    step = Hoist().plan(manifest, BuildSpec(hoist=True))
    assert isinstance(step, Step) and step.after.components == manifest.components
    order = [instance.name for instance in load_passes(PASSES)]
    assert [name for name, _ in itertools.groupby(order)] == order
    assert order.index("export") < order.index("hoist") < order.index("optimize") < order.index("quantize")
