"""The sampling loop over numpy networks: against a plain reimplementation, alone and in batches, under threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from runtimes.backends.time_profile import Profile
from runtimes.errors import BundleError, InputError, ParityError
from runtimes.inputs.noise import NoiseStreams
from runtimes.pipeline.diffusion import Pipeline, Step
from tests.runtimes import fakes
from tests.runtimes.fakes import CHANNELS, DDIM, FACTS, calls_of, fake_sessions, tokenize

NUMPY: dict[str, Any] = {"steps": 4, "output": "numpy"}


def make(**limits) -> Pipeline:
    return Pipeline(fake_sessions(**limits), FACTS, DDIM, tokenize)


def plain_ddim(prompt: str, negative: str, steps: int, scale: float, seed: int) -> np.ndarray:
    """One image by hand, in float64: arXiv 2010.02502 eq. 12 with eta 0, arXiv 2207.12598 eq. 6."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    x = NoiseStreams([seed]).sample((CHANNELS, 8, 8)).astype(np.float64)
    hidden = [fakes.text_encoder(tokenize([text])) for text in (negative, prompt)]
    for t in np.arange(steps)[::-1] * (1000 // steps) + 1:
        uncond, cond = (fakes.unet(x.astype(np.float32), np.array([t], np.float32), h) for h in hidden)
        noise = uncond + scale * (cond - uncond)
        before = t - 1000 // steps
        now, after = signal[t], signal[before] if before >= 0 else signal[0]
        original = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x = np.sqrt(after) * original + np.sqrt(1 - after) * noise
    return np.clip(fakes.vae_decoder(x / FACTS.codec.scaling_factor) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)[0]


def test_images_equal_a_plain_reimplementation():
    prompts, seeds = ["a red apple", "cat"], [3, 9]
    mine = make()(prompts, negative_prompt="bad", guidance_scale=4.0, seed=seeds, **NUMPY)
    for image, prompt, seed in zip(mine, prompts, seeds, strict=True):
        np.testing.assert_allclose(image, plain_ddim(prompt, "bad", 4, 4.0, seed), atol=2e-5)


def test_an_image_is_bit_equal_alone_and_within_a_batch():
    options: dict[str, Any] = {"guidance_scale": 3.0, "scheduler": "euler-ancestral", **NUMPY}
    batch = make()(["x", "y", "z"], seed=[5, 6, 7], **options)
    for i, prompt in enumerate("xyz"):
        np.testing.assert_array_equal(batch[i], make()(prompt, seed=5 + i, **options)[0])


def test_image_to_image_is_bit_equal_alone_and_within_a_batch():
    images = [np.random.default_rng(i).random((32, 32, 3)) for i in range(2)]
    options: dict[str, Any] = {"strength": 0.6, "eta": 1.0, **NUMPY}
    batch = make()(["x", "y"], image=images, seed=[1, 2], **options)
    for i, prompt in enumerate("xy"):
        np.testing.assert_array_equal(batch[i], make()(prompt, image=images[i], seed=1 + i, **options)[0])


def test_one_seed_counts_on_and_no_seed_differs():
    pipeline = make()
    several = pipeline("x", seed=40, images_per_prompt=3, **NUMPY)
    np.testing.assert_array_equal(several[2], pipeline("x", seed=42, **NUMPY)[0])
    assert not np.array_equal(pipeline("x", **NUMPY), pipeline("x", **NUMPY))


def test_latents_replace_the_seeds_noise_and_set_the_size():
    latents = NoiseStreams([8]).sample((CHANNELS, 8, 10))
    pipeline = make()
    np.testing.assert_array_equal(pipeline("x", latents=latents, **NUMPY),
                                  pipeline("x", seed=8, height=32, width=40, **NUMPY))


def test_prompts_and_their_images_are_in_order():
    pipeline = make()
    both = pipeline(["x", "yy"], negative_prompt=["n", "mm"], seed=[1, 2, 3, 4], images_per_prompt=2, **NUMPY)
    np.testing.assert_array_equal(both[2:], pipeline("yy", negative_prompt="mm", seed=[3, 4], images_per_prompt=2,
                                                     **NUMPY))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_batch_limit_changes_calls_but_not_images(batch):
    options: dict[str, Any] = {"seed": 1, "images_per_prompt": 5, **NUMPY}
    cut = make(batch=batch)
    np.testing.assert_array_equal(make(batch=16)("x", **options), cut("x", **options))
    for name in ("unet", "vae_decoder"):
        assert max(len(next(iter(call.values()))) for call in calls_of(cut, name)) <= batch


def test_a_graph_for_one_batch_size_only_is_padded():
    sessions = fake_sessions()
    for session in sessions.values():
        axis = session.component.axes["batch"]
        object.__setattr__(axis, "range", type(axis.range)(4, 4, 4))
    np.testing.assert_array_equal(Pipeline(sessions, FACTS, DDIM, tokenize)(["x", "y", "z"], seed=1, **NUMPY),
                                  make()(["x", "y", "z"], seed=1, **NUMPY))


def test_guidance_off_halves_the_unets_batch_and_skips_the_negative_prompt():
    pipeline = make()
    pipeline("x", guidance_scale=1.0, seed=0, **NUMPY)
    assert [len(call["sample"]) for call in calls_of(pipeline, "unet")] == [1] * 4
    assert len(calls_of(pipeline, "text_encoder")) == 1


def test_the_guidance_batch_is_negative_first():
    pipeline = make()
    pipeline("x", negative_prompt="n", seed=0, **NUMPY)
    hidden = calls_of(pipeline, "unet")[0]["encoder_hidden_states"]
    np.testing.assert_array_equal(hidden, fakes.text_encoder(tokenize(["n", "x"])))


def test_embedded_prompts_are_cached_between_calls():
    pipeline = make()
    first = pipeline(["x", "y", "x"], seed=0, **NUMPY)
    np.testing.assert_array_equal(first, pipeline(["x", "y", "x"], seed=0, **NUMPY))
    assert len(calls_of(pipeline, "text_encoder")) == 3  # x, y and the empty negative prompt
    assert pipeline.cache_stats.hits == 3 and pipeline.cache_stats.hit_rate == 0.5


def test_the_hook_sees_every_step_and_cannot_change_them():
    seen: list[Step] = []
    pipeline = make()
    latents = pipeline("x", seed=0, steps=5, output="latents", on_step=seen.append)
    assert [step.index for step in seen] == list(range(5)) and {step.total for step in seen} == {5}
    assert [step.timestep for step in seen] == [801, 601, 401, 201, 1]
    np.testing.assert_array_equal(seen[-1].latents, latents)
    with pytest.raises(ValueError, match="read-only"):
        seen[0].latents[:] = 0


def test_what_the_hook_raises_ends_the_call_and_the_pipeline_lives_on():
    class Stop(Exception):
        pass

    def stop(step: Step) -> None:
        if step.index == 1:
            raise Stop

    pipeline = make()
    expected = make()("x", seed=0, **NUMPY)
    with pytest.raises(Stop):
        pipeline("x", seed=0, on_step=stop, **NUMPY)
    assert len(calls_of(pipeline, "unet")) == 2 and not calls_of(pipeline, "vae_decoder")
    np.testing.assert_array_equal(pipeline("x", seed=0, **NUMPY), expected)


def test_a_profile_splits_the_time_and_adds_up_over_calls():
    profile, pipeline = Profile(), make()
    for _ in range(2):
        pipeline("x", seed=0, profile=profile, **NUMPY)
    assert dict(profile.calls) == {"text_encoder": 2, "unet": 8, "vae_decoder": 2}
    assert 0 < profile.python_seconds < profile.total_seconds and 0 < profile.python_share < 1
    assert sum(profile.seconds.values()) + profile.python_seconds == pytest.approx(profile.total_seconds)


def test_four_threads_get_what_one_gets():
    pipeline = make()
    wanted = [(f"prompt {i % 3}", i) for i in range(12)]
    options: dict[str, Any] = {"scheduler": "euler-ancestral", **NUMPY}
    expected = [make()(prompt, seed=seed, **options) for prompt, seed in wanted]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(first, first + 12):
            prompt, seed = wanted[i % 12]
            if not np.array_equal(pipeline(prompt, seed=seed, **options), expected[i % 12]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_images_are_what_the_numbers_say():
    pipeline = make()
    image = pipeline("x", seed=0, steps=4)[0]
    assert image.mode == "RGB" and image.size == (32, 32)
    pixels = pipeline("x", seed=0, **NUMPY)[0]
    np.testing.assert_array_equal(np.asarray(image), np.rint(pixels * 255).astype(np.uint8))


def test_numbers_that_are_not_finite_never_become_a_image():
    sessions = fake_sessions()
    unet, decoder = sessions["unet"], sessions["vae_decoder"]
    pipeline = Pipeline(sessions, FACTS, DDIM, tokenize)
    unet.function = lambda sample, timestep, encoder_hidden_states: (
        np.where(timestep[:, None, None, None] < 400, np.nan, sample).astype(np.float32))
    with pytest.raises(ParityError, match="not finite after step 4 of 5") as caught:
        pipeline("x", steps=5)
    assert caught.value.where == "unet" and caught.value.exit_code == 3
    unet.function = fakes.unet
    decoder.function = lambda latent_sample: fakes.vae_decoder(latent_sample) / np.float32(0)
    with np.errstate(all="ignore"), pytest.raises(ParityError, match="not finite"):
        pipeline("x", steps=2)


@pytest.mark.parametrize(("options", "where", "message"), [
    ({"prompt": None}, "", "NoneType, expected a string"),
    ({"prompt": []}, "prompt", "no prompt"),
    ({"prompt": ["x", 3]}, "", "int, expected a string"),
    ({"prompt": "a" * 100_001}, "", "100,001 characters"),
    ({"negative_prompt": "a" * 100_001}, "", "negative prompt has 100,001"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt", "2 negative prompts for 1"),
    ({"steps": 0}, "steps", "steps is 0"),
    ({"steps": 2.5}, "steps", "steps is 2.5"),
    ({"steps": 1001}, "steps", "1001 steps"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "nan"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "inf"),
    ({"guidance_scale": "7"}, "guidance_scale", "'7'"),
    ({"eta": 2.0}, "eta", "not between 0 and 1"),
    ({"eta": float("nan")}, "eta", "nan"),
    ({"height": 30}, "height", "height is 30, the bundle makes 16 to 64 in steps of 8"),
    ({"width": 72}, "width", "width is 72"),
    ({"width": True}, "width", "True"),
    ({"images_per_prompt": 0}, "images_per_prompt", "0"),
    ({"seed": 2**64}, "seed", "18446744073709551616"),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"seed": [1, 2]}, "seed", "2 seeds for 1 images"),
    ({"scheduler": "hein"}, "scheduler", "hein"),
    ({"output": "jpeg"}, "output", "jpeg"),
    ({"latents": np.zeros((1, 2, 8, 8))}, "latents", "float64"),
    ({"latents": np.zeros((2, 2, 8, 8), np.float32)}, "latents", r"expected float32 \(1, 2, 8, 8\)"),
    ({"latents": np.zeros((1, 2, 8, 9), np.float32)}, "width", "width is 36"),
    ({"latents": np.full((1, 2, 8, 8), np.nan, np.float32)}, "latents", "NaN"),
    ({"latents": [[1.0]]}, "latents", "list"),
    ({"image": np.zeros((32, 32, 3)), "strength": 0.0}, "strength", "strength"),
    ({"image": np.zeros((32, 32, 3)), "strength": 1.2}, "strength", "strength"),
    ({"image": np.zeros((32, 32, 3)), "strength": float("nan")}, "strength", "nan"),
    ({"image": np.zeros((32, 32, 3)), "strength": 0.1, "steps": 4}, "strength", "none of 4 steps"),
    ({"image": [np.zeros((32, 32, 3))] * 2}, "image", "2 images for 1 image to make"),
    ({"image": np.zeros((400, 32, 3))}, "image", "height is 400"),
    ({"image": 3}, "image", "int is not an image"),
    ({"image": "no-such-file.png"}, "no-such-file.png", "no such image"),
])
def test_bad_input_is_one_clear_line_before_any_network_runs(options, where, message):
    pipeline = make()
    with pytest.raises(InputError, match=message) as caught:
        pipeline(**({"prompt": "x", "seed": 0} | options))
    assert caught.value.where == where and caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not any(calls_of(pipeline, name) for name in pipeline.sessions)


def test_a_wrong_size_names_the_nearest_that_work():
    with pytest.raises(InputError, match="nearest: 24 or 32"):
        make()("x", height=30)
    with pytest.raises(InputError, match="nearest: 64;"):
        make()("x", height=100)


def test_image_to_image_without_an_encoder_is_said():
    pipeline = make()
    sessions = {k: v for k, v in pipeline.sessions.items() if k != "vae_encoder"}
    with pytest.raises(BundleError, match="no vae_encoder"):
        Pipeline(sessions, FACTS, DDIM, tokenize)("x", image=np.zeros((32, 32, 3)))
