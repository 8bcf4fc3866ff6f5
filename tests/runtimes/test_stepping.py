"""Jobs that are advanced together: what shares a call, whose fault is whose, and that company changes no image."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from runtimes.errors import CancelledError, InputError, ParityError
from runtimes.inputs.request import Request
from runtimes.pipeline.batch_facts import BatchFact, BatchFacts
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.job import Job
from runtimes.pipeline.memory_budget import MemoryBudget, MemoryModel
from runtimes.schedulers import SCHEDULERS
from tests.runtimes import fakes, schedules
from tests.runtimes.fakes import DDIM, FACTS, FakeSession, cached_pipeline, calls_of, fake_sessions, tokenize

FEW, MANY = 8, 300


def make(**changes: Any) -> Pipeline:
    return Pipeline(fake_sessions(batch=16), FACTS, DDIM, tokenize, **changes)


def run(pipeline: Pipeline, *requests: Request) -> list[Any]:
    """The requests advanced together, each as long as it takes."""
    jobs = pipeline.prepare(requests)
    while not all(job.done for job in jobs):
        pipeline.advance(jobs)
    return pipeline.finish(jobs)


def rows(pipeline: Pipeline, name: str = "unet") -> list[int]:
    return [len(next(iter(call.values()))) for call in calls_of(pipeline, name)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return schedules.make_bundle(tmp_path_factory.mktemp("schedules"))


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_survivors_of_random_schedules_equal_their_lone_runs_in_another_process(bundle: Path, count: int):
    least, outcome = schedules.compare(bundle, count)
    assert least >= schedules.LEAST_DB
    assert outcome.most > 3 and set(outcome.ended) == {"finished", "CancelledError", "ParityError", "Raised"}
    if count == MANY:
        assert {fields["scheduler"] for fields, _ in outcome.survivors} == set(SCHEDULERS)


def test_jobs_of_other_steps_scheduler_guidance_and_prompt_share_calls_and_equal_their_lone_runs():
    requests = [Request("a red apple", steps=4, scheduler="euler", guidance_scale=7.5, seed=1, output="numpy"),
                Request("cat", negative_prompt="dog", steps=7, scheduler="heun", guidance_scale=1.0, seed=2,
                        output="numpy"),
                Request(["x", "yy"], steps=6, scheduler="pndm", guidance_scale=3.0, guidance_rescale=0.5, seed=5,
                        guidance_interval=(0.3, 1.0), output="numpy")]
    pipeline = make()
    for result, request in zip(run(pipeline, *requests), requests, strict=True):
        np.testing.assert_array_equal(result, make()(request))
    assert rows(pipeline)[0] == 2 + 1 + 2  # both branches of the first, the others without guidance as yet
    assert len(rows(pipeline)) == max(len(rows(one)) for one in map(_alone, requests))
    assert max(len(set(call["timestep"].tolist())) for call in calls_of(pipeline, "unet")) == 3


def _alone(request: Request) -> Pipeline:
    pipeline = make()
    pipeline(request)
    return pipeline


def test_a_job_may_join_and_leave_at_any_step():
    pipeline = make()
    [long] = pipeline.prepare([Request("long", steps=8, seed=1, output="numpy")])
    pipeline.advance([long])
    [short] = pipeline.prepare([Request("short", steps=2, seed=2, output="numpy")])
    pipeline.advance([long, short])
    pipeline.advance([short, long])
    assert short.done and long.index == 3 and (long.total, short.total) == (8, 2)
    np.testing.assert_array_equal(pipeline.finish([short])[0], make()("short", steps=2, seed=2, output="numpy"))
    while not long.done:
        pipeline.advance([long, short])
    np.testing.assert_array_equal(pipeline.finish([long])[0], make()("long", steps=8, seed=1, output="numpy"))
    assert rows(pipeline) == [2, 4, 4, *[2] * 5]


def test_progress_and_estimate_are_there_after_every_step():
    pipeline = make()
    [job] = pipeline.prepare([Request("x", steps=3, seed=1)])
    seen = []
    while not job.done:
        pipeline.advance([job])
        seen.append((job.index, job.total))
        assert pipeline.preview(job.estimate).shape == (1, 8, 8, 3)
        with pytest.raises(ValueError, match="read-only"):
            job.latents[:] = 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


class Broken(Exception):
    pass


def _raise(step: Any) -> None:
    if step.index == 1:
        raise Broken


@pytest.mark.parametrize("fate", ["cancel", "raise", "stop", "not finite"])
def test_a_fault_of_one_job_is_its_error_and_leaves_the_others_alone(fate: str):
    pipeline, options = make(), dict[str, Any](steps=4, output="numpy")
    hook = {"raise": _raise, "stop": lambda step: step.index < 1}.get(fate)
    latents = np.full((1, 2, 8, 8), 3e38, np.float32) if fate == "not finite" else None
    [faulty] = pipeline.prepare([Request("faulty", latents=latents, scheduler="euler", **options)], on_step=hook)
    [sound] = pipeline.prepare([Request("sound", seed=3, **options)])
    jobs = [faulty, sound]
    while not sound.done:
        pipeline.advance(jobs)
        if fate == "cancel":
            faulty.cancel()
    kind = {"raise": Broken, "not finite": ParityError}.get(fate, CancelledError)
    assert isinstance(faulty.error, kind) and faulty.done and sound.error is None
    nothing, images = pipeline.finish(jobs)
    assert nothing == []
    np.testing.assert_array_equal(images, make()("sound", seed=3, **options))


def test_a_call_that_fails_is_the_error_of_the_jobs_in_it_alone():
    pipeline = make()
    unet = pipeline.sessions["unet"]
    assert isinstance(unet, FakeSession)

    def failing(sample: np.ndarray, **feeds: np.ndarray) -> np.ndarray:
        if sample.shape[2] == 16:
            raise runtimes.UnavailableError("the device is gone")
        return fakes.unet(sample, **feeds)

    unet.function = failing
    jobs = pipeline.prepare([Request("x", steps=2, seed=0, height=size) for size in (32, 64)])
    while not all(job.done for job in jobs):
        pipeline.advance(jobs)
    assert jobs[0].error is None and isinstance(jobs[1].error, runtimes.UnavailableError)
    assert [len(images) for images in pipeline.finish(jobs)] == [1, 0]


def test_an_image_that_is_not_finite_is_the_fault_of_its_own_job():
    pipeline = make()
    decoder = pipeline.sessions["vae_decoder"]
    assert isinstance(decoder, FakeSession)
    jobs = pipeline.prepare([Request("x", steps=2, seed=seed, output="numpy") for seed in (0, 1)])
    while not all(job.done for job in jobs):
        pipeline.advance(jobs)
    decoder.function = lambda latent_sample: fakes.vae_decoder(
        latent_sample * np.array([1, np.nan], np.float32)[:, None, None, None])
    images, nothing = pipeline.finish(jobs)
    assert jobs[0].error is None and isinstance(jobs[1].error, ParityError) and nothing == []
    np.testing.assert_array_equal(images, make()("x", steps=2, seed=0, output="numpy"))


def test_images_of_several_jobs_are_decoded_in_one_call_and_come_in_order():
    pipeline = make()
    requests = [Request("x", steps=2, seed=seed, images_per_prompt=count, output=output)
                for seed, count, output in ((0, 1, "pil"), (5, 2, "numpy"), (9, 1, "latents"), (11, 1, "pil"))]
    results = run(pipeline, *requests)
    assert rows(pipeline, "vae_decoder") == [4]
    for result, request in zip(results, requests, strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(make()(request)))


def test_a_job_that_is_not_done_cannot_be_finished():
    pipeline = make()
    jobs = pipeline.prepare([Request("x", steps=2)])
    with pytest.raises(InputError, match="not done"):
        pipeline.finish(jobs)
    assert not calls_of(pipeline, "vae_decoder")


def test_all_requests_are_checked_before_any_network_runs():
    pipeline = make()
    with pytest.raises(InputError, match="height is 30"):
        pipeline.prepare([Request("x"), Request("y", height=30)])
    assert not any(calls_of(pipeline, name) for name in pipeline.sessions)
    assert pipeline.prepare([]) == []


def test_whole_and_shallow_rows_are_separate_calls_with_features_of_their_own():
    requests = [Request("x", steps=6, seed=1, cache_interval=3, output="latents"),
                Request(["y", "z"], steps=5, seed=4, cache_interval=2, output="latents"),
                Request("w", steps=4, seed=7, output="latents")]
    pipeline = cached_pipeline(batch=16)
    results = run(pipeline, *requests)
    assert max(rows(pipeline, "unet_shallow")) > 4  # of both jobs
    for result, request in zip(results, requests, strict=True):
        np.testing.assert_allclose(result, cached_pipeline(batch=16)(request), rtol=1e-6, atol=1e-6)


def test_features_of_a_job_fit_it_in_another_company():
    """The rows of a call are cut otherwise as soon as company comes or goes."""
    request = Request(["x", "y", "z"], steps=6, seed=1, cache_interval=3, output="latents")
    pipeline = cached_pipeline(batch=4)
    [job] = pipeline.prepare([request])
    pipeline.advance([job])
    [other] = pipeline.prepare([Request("o", steps=9, seed=8, cache_interval=9, guidance_scale=1.0)])
    pipeline.advance([other])
    while not job.done:
        pipeline.advance([other, job])
    np.testing.assert_allclose(pipeline.finish([job])[0], cached_pipeline(batch=4)(request), rtol=1e-6, atol=1e-6)


def test_rows_of_other_sizes_do_not_share_a_call():
    pipeline = make()
    run(pipeline, Request("x", steps=2, seed=0), Request("x", steps=2, seed=0, height=40))
    assert rows(pipeline) == [2, 2, 2, 2]


def test_more_rows_than_the_network_takes_are_cut_between_images():
    pipeline = Pipeline(fake_sessions(batch=4), FACTS, DDIM, tokenize)
    run(pipeline, *[Request("x", steps=1, seed=i, guidance_scale=scale) for i, scale in enumerate((5, 1, 5, 1, 5))])
    assert sum(rows(pipeline)) == 8 and max(rows(pipeline)) <= 4 and len(rows(pipeline)) <= 3


def test_memory_decides_how_many_images_of_several_jobs_share_a_call():
    budget = MemoryBudget(20_000_000, MemoryModel(10e6, {"denoiser": (0, 1e6 / 64, 0), "decoder": (0, 2e6 / 64, 0)}))
    pipeline = make(memory=budget)
    run(pipeline, *[Request("x", steps=1, seed=i) for i in range(4)])
    assert max(rows(pipeline)) == 4 and max(rows(pipeline, "vae_decoder")) == 2
    free = make()
    run(free, *[Request("x", steps=1, seed=i) for i in range(4)])
    assert rows(free) == [8] and rows(free, "vae_decoder") == [4]


def test_prompts_are_encoded_together_where_their_rows_do_not_depend_on_company():
    requests = [Request(prompt, steps=1, seed=0, output="latents") for prompt in "abc"]
    exact = make(batches=BatchFacts({"text_encoder": BatchFact(exact=True)}))
    unknown = make()
    np.testing.assert_array_equal(run(exact, *requests), run(unknown, *requests))
    assert rows(exact, "text_encoder") == [4] and rows(unknown, "text_encoder") == [1] * 4


def test_images_are_encoded_together_where_their_rows_do_not_depend_on_company():
    requests = [Request("x", steps=2, seed=i, image=np.full((32, 32, 3), i / 4), output="latents") for i in range(3)]
    exact = make(batches=BatchFacts({"vae_encoder": BatchFact(exact=True)}))
    unknown = make()
    np.testing.assert_array_equal(run(exact, *requests), run(unknown, *requests))
    assert rows(exact, "vae_encoder") == [3] and rows(unknown, "vae_encoder") == [1] * 3


def test_a_network_whose_rows_look_at_each_other_is_never_shared():
    """Ranges of dynamic INT8 are those of all rows of a call."""
    pipeline = make(batches=BatchFacts({"unet": BatchFact(exact=False, decibels=22.0, fixed=False)}))
    run(pipeline, Request("x", steps=1, seed=0), Request("y", steps=1, seed=0, images_per_prompt=2))
    assert rows(pipeline) == [2, 4]


def test_deterministic_calls_have_one_number_of_rows_unless_the_number_does_not_matter():
    facts = {"unet": BatchFact(exact=False, decibels=140.0), "vae_decoder": BatchFact(exact=True)}
    pipeline = make(batches=BatchFacts(facts, deterministic=True))
    run(pipeline, *[Request("x", steps=1, seed=i, guidance_scale=1) for i in range(3)])
    opt = pipeline.sessions["unet"].component.axes["batch"].range.opt
    assert set(rows_of(pipeline)) == {opt} and decoded_rows(pipeline) == [3]


def rows_of(pipeline: Pipeline) -> list[int]:
    return [len(call["sample"]) for call in pipeline.sessions["unet"].inner.calls]  # type: ignore[attr-defined]


def decoded_rows(pipeline: Pipeline) -> list[int]:
    return rows(pipeline, "vae_decoder")


def test_tiles_stay_alone_in_their_calls():
    sessions = fake_sessions(side=(4, 8), batch=16)
    pipeline = Pipeline(sessions, FACTS, DDIM, tokenize)
    requests = [Request("x", steps=1, seed=0, height=64, width=64, tile=32, output="latents"),
                Request("y", steps=1, seed=0, output="latents")]
    results = run(pipeline, *requests)
    assert set(rows(pipeline)) == {2}
    for result, request in zip(results, requests, strict=True):
        np.testing.assert_array_equal(
            result, Pipeline(fake_sessions(side=(4, 8), batch=16), FACTS, DDIM, tokenize)(request))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_methods_that_ask_twice_a_step_say_how_often(name: str):
    pipeline = make()
    [job] = pipeline.prepare([Request("x", steps=5, seed=0, scheduler=name)])
    while not job.done:
        pipeline.advance([job])
    assert len(calls_of(pipeline, "unet")) == job.index == job.total >= 5


def test_a_job_given_twice_takes_one_step():
    pipeline = make()
    [job] = pipeline.prepare([Request("x", steps=3, seed=0)])
    pipeline.advance([job, job])
    assert job.index == 1 and isinstance(job, Job)


def test_a_whole_request_can_be_called_and_takes_no_further_field():
    request = Request("x", steps=2, seed=0, output="numpy")
    np.testing.assert_array_equal(make()(request), make()("x", steps=2, seed=0, output="numpy"))
    with pytest.raises(InputError, match="beside a whole request"):
        make()(request, steps=3)
    assert dataclasses.replace(request, steps=3).steps == 3


def test_samplers_of_the_schedules_come_in_turn():
    import random

    wanted = [schedules.random_job(random.Random(0), FACTS, (32, 40), i) for i in range(2 * len(SCHEDULERS))]
    assert set(Counter(one.fields["scheduler"] for one in wanted).values()) == {2}
    assert math.isinf(schedules.decibels(np.ones(3), np.ones(3)))
