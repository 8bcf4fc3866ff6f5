"""Inpainting, guidance rescaling and intervals, weighted and long prompts: against diffusers over the same networks."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from runtimes.inputs.noise import NoiseStreams
from runtimes.text.prompt_encoder import MAX_WINDOWS
from tests.runtimes.diffusers_reference import (
    CHANNELS,
    NEGATIVES,
    PROMPTS,
    SAMPLERS_OF_BOTH,
    TOKENS,
    assert_same,
    generators,
    make_networks,
    ours,
    psnr,
    reference,
)
from tests.runtimes.fakes import calls_of

pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
              pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def inpainting_networks(tmp_path_factory) -> dict[str, Any]:
    return make_networks(tmp_path_factory.mktemp("inpainting"), extra_channels=CHANNELS + 1)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White on the right half, with a hole."""
    values = np.zeros((32, 40), np.uint8)
    values[:, 17:] = 255
    values[4:12, 25:31] = 0
    return Image.fromarray(values)


SAMPLERS = [(*sampler, share) for sampler, share in
            zip(product(SAMPLERS_OF_BOTH, ("epsilon", "v_prediction")), cycle((0.7, 1.0, 1.0, 0.7)))]


def small(images):
    return [p.resize((40, 32), Image.Resampling.LANCZOS) for p in images]


@pytest.mark.parametrize(("scheduler", "prediction", "strength"), SAMPLERS)
def test_inpainting_by_blending_equals_diffusers(
    networks, folder, images, mask, scheduler, prediction, strength
):
    pipe, config = reference(networks, StableDiffusionInpaintPipeline, prediction, scheduler)
    seeds = [21, 22]
    theirs = pipe(PROMPTS, image=small(images), mask_image=[mask] * 2, strength=strength, negative_prompt=NEGATIVES,
                  num_inference_steps=8, guidance_scale=4.0, height=32, width=40, output_type="np",
                  generator=generators(seeds)).images
    mine = ours(networks, config, folder)(
        PROMPTS, image=small(images), mask=mask, strength=strength, negative_prompt=NEGATIVES, steps=8,
        height=32, width=40, guidance_scale=4.0, seed=seeds, scheduler=scheduler, output="numpy")
    assert_same(mine, theirs)


@pytest.mark.parametrize(("scheduler", "prediction", "strength"), SAMPLERS)
def test_inpainting_with_a_unet_trained_for_it_equals_diffusers(
    inpainting_networks, folder, networks, images, mask, scheduler, prediction, strength
):
    pipe, config = reference(inpainting_networks, StableDiffusionInpaintPipeline, prediction, scheduler)
    seeds = [3, 4]
    theirs = pipe(PROMPTS, image=small(images), mask_image=[mask] * 2, strength=strength, negative_prompt=NEGATIVES,
                  num_inference_steps=8, guidance_scale=4.0, height=32, width=40, output_type="np",
                  generator=generators(seeds)).images
    mine = ours(inpainting_networks, config, folder)(
        PROMPTS, image=small(images), mask=mask, strength=strength, negative_prompt=NEGATIVES, steps=8,
        height=32, width=40, guidance_scale=4.0, seed=seeds, scheduler=scheduler, output="numpy")
    assert_same(mine, theirs)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 0.5), ("euler-ancestral", 0.0), ("lcm", 0.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("mode", ["text", "image", "mask"])
def test_a_seed_makes_the_image_that_diffusers_makes_of_it(
    networks, folder, images, mask, mode, scheduler, eta, single
):
    kind = {"text": StableDiffusionPipeline, "image": StableDiffusionImg2ImgPipeline,
            "mask": StableDiffusionInpaintPipeline}[mode]
    pipe, config = reference(networks, kind, scheduler=scheduler)
    options: dict[str, Any] = {} if mode == "text" else {"image": small(images)[0], "strength": 0.7}
    if mode != "image":
        options |= {"height": 32, "width": 40}
    generator = generators([7])
    theirs = pipe("cat", num_inference_steps=6, guidance_scale=4.0, eta=eta, output_type="np",
                  generator=generator[0] if single else generator, **options,
                  **({"mask_image": mask} if mode == "mask" else {})).images
    mine = ours(networks, config, folder)("cat", steps=6, guidance_scale=4.0, eta=eta, scheduler=scheduler, seed=7,
                                          output="numpy", mask=mask if mode == "mask" else None, **options)
    assert_same(mine, theirs)


def test_one_image_under_several_prompts_is_inpainted_as_if_each_were_alone(networks, folder, images, mask):
    """diffusers does so when it is given once for each; given once, it samples for it from the first generator."""
    pipe, config = reference(networks, StableDiffusionInpaintPipeline)
    image = small(images)[0]
    options: dict[str, Any] = {"height": 32, "width": 40, "strength": 0.7}
    mine = ours(networks, config, folder)(PROMPTS, image=image, mask=mask, seed=[3, 4], steps=5, output="numpy",
                                          **options)
    given: dict[str, Any] = {"mask_image": mask, "num_inference_steps": 5, "output_type": "np", **options}
    assert_same(mine, pipe(PROMPTS, image=[image] * 2, generator=generators([3, 4]), **given).images)
    once = pipe(PROMPTS, image=image, generator=generators([3, 4]), **given).images
    assert psnr(mine[:1], once[:1]) >= 60 > psnr(mine[1:], once[1:])


@pytest.mark.parametrize(("prompts", "shown", "copies"), [(4, 2, 1), (1, 2, 2), (2, 2, 2), (2, 4, 2), (1, 1, 3)])
def test_several_images_are_dealt_out_in_turn_as_diffusers_does(networks, folder, images, prompts, shown, copies):
    pipe, config = reference(networks, StableDiffusionImg2ImgPipeline)
    texts, seeds = (PROMPTS * 2)[:prompts], list(range(prompts * copies))
    given = (small(images) + [p.rotate(180) for p in small(images)])[:shown]
    theirs = pipe(texts, image=given, num_inference_steps=4, strength=0.7, num_images_per_prompt=copies,
                  generator=generators(seeds), output_type="np").images
    mine = ours(networks, config, folder)(texts, image=given, steps=4, strength=0.7, images_per_prompt=copies,
                                          seed=seeds, output="numpy")
    assert_same(mine, theirs)


@pytest.mark.parametrize(("shown", "masks"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("trained", [True, False])
def test_images_and_masks_are_paired_as_diffusers_does(
    inpainting_networks, networks, folder, images, mask, shown, masks, trained
):
    """With equal seeds: upstream samples from the first generator alone for what is given once."""
    chosen = inpainting_networks if trained else networks
    pipe, config = reference(chosen, StableDiffusionInpaintPipeline)
    given_masks = [mask, mask.rotate(180)][:masks]
    latents = NoiseStreams([1, 2]).sample((CHANNELS, 8, 10))
    seeds = [5, 5]
    theirs = pipe(PROMPTS, image=small(images)[:shown], mask_image=given_masks, num_inference_steps=4, height=32,
                  width=40, latents=torch.from_numpy(latents), generator=generators(seeds), output_type="np").images
    mine = ours(chosen, config, folder)(PROMPTS, image=small(images)[:shown], mask=given_masks, steps=4, height=32,
                                        width=40, latents=latents, seed=seeds, output="numpy")
    assert_same(mine, theirs)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("trained", [True, False])
def test_given_latents_are_pure_noise_under_a_mask_as_in_diffusers(
    inpainting_networks, networks, folder, images, mask, strength, trained
):
    chosen = inpainting_networks if trained else networks
    pipe, config = reference(chosen, StableDiffusionInpaintPipeline, scheduler="euler-ancestral")
    latents = NoiseStreams([1]).sample((CHANNELS, 8, 10))
    options: dict[str, Any] = {"image": small(images)[0], "strength": strength, "height": 32, "width": 40}
    theirs = pipe("cat", mask_image=mask, num_inference_steps=6, latents=torch.from_numpy(latents), output_type="np",
                  generator=generators([7]), **options).images
    mine = ours(chosen, config, folder)("cat", mask=mask, steps=6, latents=latents, seed=7, output="numpy",
                                        scheduler="euler-ancestral", **options)
    assert_same(mine, theirs)


@pytest.mark.parametrize("size", [(40, 32), (17, 90), (64, 16)])
@pytest.mark.parametrize("kind", ["pillow", "array", "both"])
def test_under_a_mask_the_model_says_the_size_and_both_are_stretched_to_it(
    networks, folder, images, mask, kind, size
):
    pipe, config = reference(networks, StableDiffusionInpaintPipeline)
    image, over = images[0], mask.resize(size)
    given = image if kind == "pillow" else np.asarray(image, np.float32) / 255
    given_mask = np.asarray(over, np.float32) / 255 if kind == "array" else over
    theirs = pipe("cat", image=given, mask_image=given_mask, num_inference_steps=4, generator=generators([7]),
                  output_type="np").images
    mine = ours(networks, config, folder)("cat", image=given, mask=given_mask, steps=4, seed=7, output="numpy")
    assert mine.shape == (1, 32, 32, 3)  # from an image of 45 x 38
    assert_same(mine, theirs)


@pytest.mark.parametrize("batch", [True, False])
def test_arrays_of_images_equal_diffusers(networks, folder, images, batch):
    pipe, config = reference(networks, StableDiffusionImg2ImgPipeline)
    arrays = [np.asarray(p.resize((43, 35)), np.float32) / 255 for p in images]
    given: Any = np.stack(arrays) if batch else arrays
    theirs = pipe(PROMPTS, image=given, strength=0.7, num_inference_steps=4, generator=generators([7, 8]),
                  output_type="np").images
    mine = ours(networks, config, folder)(PROMPTS, image=given, strength=0.7, steps=4, seed=7, output="numpy")
    assert_same(mine, theirs)


def test_blending_keeps_what_the_mask_keeps(networks, folder, images, mask):
    pipeline = ours(networks, reference(networks)[1], folder)
    options: dict[str, Any] = {"steps": 6, "seed": 1, "height": 32, "width": 40, "output": "latents"}
    keep_all = Image.new("L", (40, 32), 0)
    kept = [pipeline(p, image=small(images)[0], mask=keep_all, **options) for p in PROMPTS]
    np.testing.assert_array_equal(kept[0], kept[1])  # the prompt cannot matter where nothing is painted
    half = pipeline(PROMPTS[0], image=small(images)[0], mask=mask, **options)
    painted = np.asarray(mask)[::4, ::4] > 127
    np.testing.assert_array_equal(half[..., ~painted], kept[0][..., ~painted])
    assert np.abs(half - kept[0])[..., painted].mean() > 0.1


def test_a_unet_for_inpainting_generates_from_the_prompt_alone_too(inpainting_networks, networks, folder):
    pipeline = ours(inpainting_networks, reference(inpainting_networks)[1], folder)
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    alone = pipeline(PROMPTS[0], steps=3, seed=1, output="latents")
    everything = pipeline(PROMPTS[0], image=grey, mask=Image.new("L", (32, 32), 255), steps=3, seed=1, output="latents")
    np.testing.assert_array_equal(alone, everything)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_guidance_rescale_equals_diffusers(networks, folder, rescale):
    pipe, config = reference(networks, prediction="v_prediction")
    latents = NoiseStreams([1, 2]).sample((CHANNELS, 8, 8))
    options: dict[str, Any] = {"guidance_scale": 6.0, "guidance_rescale": rescale}
    theirs = pipe(PROMPTS, num_inference_steps=5, latents=torch.from_numpy(latents), output_type="np", **options).images
    pipeline = ours(networks, config, folder)
    mine = pipeline(PROMPTS, steps=5, latents=latents, output="numpy", **options)
    assert_same(mine, theirs)
    assert psnr(mine, pipeline(PROMPTS, steps=5, latents=latents, output="numpy", guidance_scale=6.0)) < 50


def test_guidance_on_an_interval_equals_diffusers_switched_by_its_callback(networks, folder):
    pipe, config = reference(networks)
    latents = NoiseStreams([1, 2]).sample((CHANNELS, 8, 8))

    def switch(pipeline, i, timestep, values):
        pipeline._guidance_scale = 5.0 if 2 <= i + 1 < 6 else 1.0
        guided, had = pipeline._guidance_scale > 1, len(values["prompt_embeds"]) == 4
        if guided and not had:
            values["prompt_embeds"] = torch.cat([uncond, values["prompt_embeds"]])
        return values if guided else {"prompt_embeds": values["prompt_embeds"][-2:]}

    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    theirs = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=8, guidance_scale=1.0,
                  latents=torch.from_numpy(latents), output_type="np", callback_on_step_end=switch,
                  callback_on_step_end_tensor_inputs=["prompt_embeds"]).images
    pipeline = ours(networks, config, folder)
    mine = pipeline(PROMPTS, negative_prompt=NEGATIVES, steps=8, guidance_scale=5.0, guidance_interval=(0.25, 0.75),
                    latents=latents, output="numpy")
    assert_same(mine, theirs)
    assert [len(call["sample"]) for call in calls_of(pipeline, "unet")] == [2, 2, 4, 4, 4, 4, 2, 2]


def hidden_of(networks, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return networks["text_encoder"](torch.from_numpy(ids))[0]


def test_weighted_and_long_prompts_equal_diffusers_given_their_embeddings(networks, folder):
    """The embeddings are built here from diffusers' tokenizer and text encoder, window by window."""
    pipe, config = reference(networks)
    tokenizer, room = networks["tokenizer"], TOKENS - 2
    words = [("a red apple ", 1.0), ("grinning cat", 1.4), (" on the house ", 1.0), ("crying dog", 1 / 1.1)]
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in [*words, *[(" house apple", 1.0)] * 10]:
        found = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + found, weights + [weight] * len(found)
    assert 2 * room < len(ids) <= 3 * room
    empty = tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="np").input_ids
    z_empty, windows = hidden_of(networks, empty)[0], []
    for first in range(0, len(ids), room):
        part = ids[first : first + room]
        row = empty[0].copy()
        row[: len(part) + 2] = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
        scale = torch.ones(TOKENS)
        scale[1 : len(part) + 1] = torch.tensor(weights[first : first + room])
        windows.append(z_empty + scale[:, None] * (hidden_of(networks, row[None])[0] - z_empty))
    cond, uncond = torch.cat(windows)[None], torch.cat([z_empty] * len(windows))[None]
    latents = NoiseStreams([1]).sample((CHANNELS, 8, 8))
    theirs = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, num_inference_steps=5, guidance_scale=5.0,
                  latents=torch.from_numpy(latents), output_type="np").images
    prompt = "a red apple (grinning cat:1.4) on the house [crying dog]" + " house apple" * 10
    options: dict[str, Any] = {"steps": 5, "guidance_scale": 5.0, "latents": latents, "output": "numpy"}
    pipeline = ours(networks, config, folder)
    mine = pipeline(prompt, weighting=True, long_prompts=True, **options)
    assert_same(mine, theirs)
    assert psnr(mine, pipeline(prompt.replace("1.4", "1.0"), weighting=True, long_prompts=True, **options)) < 60


def test_an_unweighted_prompt_is_the_same_however_it_is_read(networks, folder):
    pipeline = ours(networks, reference(networks)[1], folder)
    options: dict[str, Any] = {"steps": 3, "seed": 1, "output": "numpy"}
    plain = pipeline(PROMPTS[0], **options)
    np.testing.assert_array_equal(plain, pipeline(PROMPTS[0], weighting=True, long_prompts=True, **options))
    np.testing.assert_array_equal(plain, pipeline("a (red:1.0) apple on the house", weighting=True, **options))


def test_a_short_prompt_generates_the_same_beside_a_long_one(networks, folder):
    pipeline = ours(networks, reference(networks)[1], folder)
    options: dict[str, Any] = {"steps": 3, "long_prompts": True, "output": "latents"}
    both = pipeline([PROMPTS[0], "house apple " * 12], seed=[5, 6], **options)
    np.testing.assert_array_equal(both[:1], pipeline(PROMPTS[0], seed=5, **options))
    np.testing.assert_array_equal(both[1:], pipeline("house apple " * 12, seed=6, **options))


def test_a_prompt_of_more_windows_than_anyone_writes_is_refused(networks, folder):
    pipeline = ours(networks, reference(networks)[1], folder)
    with pytest.raises(Exception, match=f"windows, at most {MAX_WINDOWS}"):
        pipeline("x!" * 1999, long_prompts=True, steps=1)


def test_what_is_cut_from_a_weighted_prompt_is_logged(networks, folder, caplog):
    pipeline = ours(networks, reference(networks)[1], folder)
    pipeline("house apple " * 12, weighting=True, steps=1, seed=0, output="latents")
    assert "all but the first are cut" in caplog.text


def test_the_default_reading_of_brackets_is_diffusers(networks, folder):
    pipe, config = reference(networks, StableDiffusionPipeline)
    latents = NoiseStreams([1]).sample((CHANNELS, 8, 8))
    prompt = "a (red:1.5) [cat]"
    theirs = pipe(prompt, num_inference_steps=3, latents=torch.from_numpy(latents), output_type="np").images
    assert_same(ours(networks, config, folder)(prompt, steps=3, latents=latents, output="numpy"), theirs)
