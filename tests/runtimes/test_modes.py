"""What a user can get wrong or stop in the middle: masks, weights, guidance, cancelling; and previews."""

from __future__ import annotations

from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.errors import CancelledError, InputError
from runtimes.pipeline.diffusion import Pipeline
from runtimes.pipeline.job import Step
from runtimes.text.prompt_weighting import parse
from tests.runtimes import fakes
from tests.runtimes.fakes import CHANNELS, DDIM, FACTS, FakeSession, cached_pipeline, calls_of, fake_sessions, tokenize

NUMPY: dict[str, Any] = {"steps": 4, "output": "numpy"}
SIZE = (32, 32)


def make() -> Pipeline:
    return Pipeline(fake_sessions(), FACTS, DDIM, tokenize)


@pytest.mark.parametrize(("options", "word"), [
    ({"mask": Image.new("L", SIZE)}, "without an image"),
    ({"image": Image.new("RGB", SIZE), "mask": [Image.new("L", SIZE)] * 3}, "3 masks for 1 image to make"),
    ({"image": [Image.new("RGB", SIZE)] * 2, "mask": [Image.new("L", SIZE)] * 4, "images_per_prompt": 4},
     "4 masks for 2 images"),
    ({"image": [], "mask": []}, "0 images for 1 image to make"),
    ({"image": [Image.new("RGB", SIZE), np.zeros((32, 32, 3))], "images_per_prompt": 2}, "not all arrays"),
    ({"image": np.zeros((1, 32, 32, 3)), "mask": np.zeros((2, 32, 32))}, "2 masks for 1 image to make"),
    ({"image": Image.new("RGB", SIZE), "mask": "nowhere.png"}, "nowhere.png"),
    ({"image": Image.new("RGB", SIZE), "mask": np.zeros((0, 4), np.uint8)}, "is not a mask"),
    ({"guidance_rescale": 1.5}, "guidance_rescale"), ({"guidance_rescale": float("nan")}, "guidance_rescale"),
    ({"guidance_interval": (0.7, 0.2)}, "interval"), ({"guidance_interval": 0.5}, "pair"),
    ({"guidance_interval": (0, 2)}, "interval"), ({"weighting": True}, "plain prompts only"),
])
def test_unusable_modes_are_refused_before_the_unet_runs(options, word):
    pipeline = make()
    with pytest.raises(InputError, match=word):
        pipeline("x", seed=0, **options, **NUMPY)
    assert not calls_of(pipeline, "unet")


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (17, 17), (301, 300), (32, 16), (8, 90)])
def test_a_mask_may_be_of_another_size_and_shape_than_its_image(size):
    image = Image.effect_noise(SIZE, 90).convert("RGB")
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, size[0] // 2:] = 255
    pipeline = make()
    options: dict[str, Any] = {"seed": 0, "steps": 4, "output": "latents"}
    kept = pipeline("x", image=image, mask=Image.new("L", SIZE), **options)
    half = pipeline("x", image=image, mask=Image.fromarray(pixels), **options)
    np.testing.assert_array_equal(half[..., :4], kept[..., :4])
    assert (half[..., 4:] != kept[..., 4:]).all()


def test_each_prompt_may_have_its_own_mask_over_one_image():
    image = Image.effect_noise(SIZE, 90).convert("RGB")
    options: dict[str, Any] = {"steps": 3, "output": "latents"}
    none, everything = Image.new("1", SIZE, 0), Image.new("1", SIZE, 1)
    both = make()(["x", "y"], image=image, mask=[none, everything], seed=[1, 2], **options)
    for i, (prompt, mask) in enumerate((("x", none), ("y", everything))):
        np.testing.assert_array_equal(both[i : i + 1],
                                      make()(prompt, image=image, mask=mask, seed=i + 1, **options))


def test_false_from_the_hook_cancels_and_leaves_nothing():
    pipeline, expected = make(), make()("x", seed=0, **NUMPY)
    with pytest.raises(CancelledError) as caught:
        pipeline("x", seed=0, on_step=lambda step: step.index < 1, **NUMPY)
    assert (caught.value.steps_taken, caught.value.total, caught.value.exit_code) == (2, 4, 130)
    assert len(calls_of(pipeline, "unet")) == 2 and not calls_of(pipeline, "vae_decoder")
    np.testing.assert_array_equal(pipeline("x", seed=0, **NUMPY), expected)


def test_another_thread_cancels_with_an_event():
    pipeline, cancel = make(), Event()

    def set_at_the_third(step: Step) -> None:
        if step.index == 2:
            cancel.set()

    with pytest.raises(CancelledError, match="after 3 of 4"):
        pipeline("x", seed=0, cancel=cancel, on_step=set_at_the_third, **NUMPY)
    assert len(calls_of(pipeline, "unet")) == 3
    with pytest.raises(CancelledError, match="after 0 of 4"):
        pipeline("x", seed=0, cancel=cancel, **NUMPY)


@pytest.mark.parametrize(("network", "taken"), [("text_encoder", 0), ("unet", 0), ("vae_decoder", 4)])
def test_an_event_set_in_mid_step_ends_the_call_before_its_next_call_of_a_network(network, taken):
    """Images that share no call: a batch of one makes three calls of each network a step."""
    pipeline, cancel = Pipeline(fake_sessions(batch=1), FACTS, DDIM, tokenize), Event()
    session, expected = pipeline.sessions[network], make()(["x", "y", "z"], seed=0, **NUMPY)
    assert isinstance(session, FakeSession)
    function = session.function

    def set_while_running(**feeds: Any) -> Any:
        cancel.set()
        return function(**feeds)

    session.function = set_while_running
    with pytest.raises(CancelledError, match=f"after {taken} of 4"):
        pipeline(["x", "y", "z"], seed=0, cancel=cancel, **NUMPY)
    assert len(calls_of(pipeline, network)) == 1
    session.function = function
    np.testing.assert_allclose(pipeline(["x", "y", "z"], seed=0, **NUMPY), expected, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "unipc", "pndm", "lcm", "euler-ancestral"])
def test_the_estimate_ends_at_the_latents_and_begins_near_zero(scheduler):
    seen: list[Step] = []
    latents = make()("x", seed=0, steps=8, scheduler=scheduler, output="latents", on_step=seen.append)
    np.testing.assert_array_equal(seen[-1].estimate, latents)
    assert seen[0].estimate.std() < 0.7 and all(np.isfinite(step.estimate).all() for step in seen)
    with pytest.raises(ValueError, match="read-only"):
        seen[0].estimate[:] = 0


def test_previews_have_the_colours_of_the_decoder():
    """This decoder is linear and pale enough that no colour is cut off: the fit must be exact."""
    pipeline = make()
    decoder = pipeline.sessions["vae_decoder"]
    assert isinstance(decoder, FakeSession)
    decoder.function = lambda latent_sample: fakes.vae_decoder(latent_sample) * 0.1
    latents = np.random.default_rng(1).standard_normal((2, CHANNELS, 4, 6)).astype(np.float32)
    shown = pipeline.preview(latents)
    assert shown.shape == (2, 4, 6, 3) and shown.dtype == np.uint8
    decoded = decoder.run({"latent_sample": latents / np.float32(FACTS.codec.scaling_factor)})["sample"]
    wanted = np.clip(decoded[:, :, ::4, ::4].transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
    assert np.abs(shown - wanted).max() <= 1
    calls = len(calls_of(pipeline, "vae_decoder"))
    pipeline.preview(latents)
    assert len(calls_of(pipeline, "vae_decoder")) == calls


@pytest.mark.parametrize(("prompt", "wanted"), [
    ("a cat", [("a cat", 1.0)]),
    ("(cat)", [("cat", 1.1)]),
    ("((cat))", [("cat", 1.1 * 1.1)]),
    ("[cat]", [("cat", 1 / 1.1)]),
    ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
    ("(cat: 1.25 )", [("cat", 1.25)]),
    ("(cat:0)", [("cat", 0.0)]),
    ("[cat:1.5]", [("cat:1.5", 1 / 1.1)]),
    ("a (cat", [("a (cat", 1.0)]),
    ("a) cat]", [("a) cat]", 1.0)]),
    ("(a [b) c]", [("(a ", 1.0), ("b) c", 1 / 1.1)]),
    (r"\(cat:2\)", [("(cat:2)", 1.0)]),
    ("a\\b", [("a\\b", 1.0)]),
    ("()", []),
    ("", []),
])
def test_weights_are_read_from_brackets(prompt, wanted):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


def test_absurd_weights_are_refused():
    with pytest.raises(InputError, match="above 10"):
        parse("(cat:1000)")


def test_the_deep_layers_run_at_every_third_step_only():
    pipeline = cached_pipeline()
    images = pipeline(["x", "y"], seed=0, steps=8, cache_interval=3, output="numpy")
    whole, shallow = ([call["timestep"][0] for call in calls_of(pipeline, name)] for name in ("unet", "unet_shallow"))
    assert whole == sorted({*whole, *shallow}, reverse=True)[::3] and len(whole) + len(shallow) == 8
    assert not np.array_equal(images, pipeline(["x", "y"], seed=0, steps=8, output="numpy"))
    np.testing.assert_array_equal(pipeline(["x", "y"], seed=0, steps=8, output="numpy"),
                                  make()(["x", "y"], seed=0, steps=8, output="numpy"))


def test_a_change_of_guidance_computes_the_deep_layers_anew():
    pipeline = cached_pipeline()
    pipeline("x", seed=0, steps=8, cache_interval=4, guidance_interval=(0.25, 0.75), output="numpy")
    assert [len(call["sample"]) for call in calls_of(pipeline, "unet")] == [1, 2, 1]
    assert [len(call["sample"]) for call in calls_of(pipeline, "unet_shallow")] == [1, 2, 2, 2, 1]


def test_each_part_of_a_cut_batch_keeps_its_own_deep_feature():
    options: dict[str, Any] = {"seed": 0, "steps": 6, "cache_interval": 2, "output": "latents"}
    np.testing.assert_allclose(cached_pipeline(batch=2)(["x", "y", "z"], **options),
                               cached_pipeline()(["x", "y", "z"], **options), rtol=1e-6, atol=1e-6)


def test_reusing_deep_features_needs_a_bundle_built_for_it():
    with pytest.raises(InputError, match="--step-cache"):
        make()("x", cache_interval=2)
    with pytest.raises(InputError, match="cache_interval"):
        cached_pipeline()("x", cache_interval=0)
