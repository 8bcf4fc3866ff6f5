"""The whole pipeline against diffusers' own, over the very same networks: what differs is only our loop."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from runtimes.errors import InputError
from runtimes.inputs.noise import NoiseStreams
from tests.runtimes.diffusers_reference import (
    CHANNELS,
    NEGATIVES,
    PROMPTS,
    SAMPLERS_OF_BOTH,
    assert_same,
    generators,
    ours,
    psnr,
    reference,
)
from tests.runtimes.fakes import calls_of

# diffusers 0.42 hands tensors to numpy functions
pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
              pytest.mark.usefixtures("one_thread")]

SAMPLERS = list(product(SAMPLERS_OF_BOTH, ("epsilon", "v_prediction")))
CASES = [*((*sampler, 0.0) for sampler in SAMPLERS), ("ddim", "epsilon", 1.0), ("tcd", "epsilon", 0.4)]


@pytest.mark.parametrize(("scheduler", "prediction", "eta"), CASES)
def test_text_to_image_equals_diffusers(networks, folder, scheduler, prediction, eta):
    pipe, config = reference(networks, prediction=prediction, scheduler=scheduler)
    seeds = [11, 5]
    theirs = pipe(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=6, guidance_scale=5.0, height=32, width=40,
                  eta=eta, generator=generators(seeds), output_type="np").images
    mine = ours(networks, config, folder)(
        PROMPTS, negative_prompt=NEGATIVES, steps=6, guidance_scale=5.0, height=32, width=40, eta=eta, seed=seeds,
        scheduler=scheduler, output="numpy")
    assert_same(mine, theirs)


def test_the_negative_prompt_and_guidance_matter_here(networks, folder):
    pipeline = ours(networks, reference(networks)[1], folder)
    options: dict[str, Any] = {"steps": 4, "seed": 3, "output": "numpy"}
    base = pipeline(PROMPTS[0], guidance_scale=5.0, **options)
    for other in ({"negative_prompt": "blue"}, {"guidance_scale": 2.0}, {"guidance_scale": 1.0}):
        assert psnr(base, pipeline(PROMPTS[0], **({"guidance_scale": 5.0} | options | other))) < 50


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.001])
def test_guidance_at_and_around_one_equals_diffusers(networks, folder, scale):
    pipe, config = reference(networks)
    latents = NoiseStreams([1]).sample((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=scale, latents=torch.from_numpy(latents),
                  output_type="np").images
    pipeline = ours(networks, config, folder)
    assert_same(pipeline(PROMPTS[0], steps=3, guidance_scale=scale, latents=latents, output="numpy"), theirs)
    assert {len(call["sample"]) for call in calls_of(pipeline, "unet")} == {2 if scale > 1 else 1}


def test_pil_output_and_several_images_per_prompt_equal_diffusers(networks, folder):
    pipe, config = reference(networks)
    latents = NoiseStreams([1, 2, 3, 4]).sample((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS, num_inference_steps=3, num_images_per_prompt=2, latents=torch.from_numpy(latents)).images
    mine = ours(networks, config, folder)(PROMPTS, steps=3, images_per_prompt=2, latents=latents)
    for a, b in zip(mine, theirs, strict=True):
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_latents_output_equals_diffusers(networks, folder):
    pipe, config = reference(networks, scheduler="euler")
    latents = NoiseStreams([1]).sample((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS[0], num_inference_steps=5, latents=torch.from_numpy(latents), output_type="latent").images
    mine = ours(networks, config, folder)(PROMPTS[0], steps=5, latents=latents, scheduler="euler", output="latents")
    assert np.linalg.norm(mine - theirs.numpy()) <= 1e-5 * np.linalg.norm(theirs.numpy())


@pytest.mark.parametrize(("scheduler", "prediction", "strength"), [
    *((*sampler, 0.6) for sampler in SAMPLERS), ("ddim", "v_prediction", 0.35),
    ("ddim", "epsilon", 1.0)])
def test_image_to_image_equals_diffusers(networks, folder, images, scheduler, prediction, strength):
    pipe, config = reference(networks, StableDiffusionImg2ImgPipeline, prediction, scheduler)
    seeds = [21, 22]
    theirs = pipe(PROMPTS, image=[p.resize((40, 32), Image.Resampling.LANCZOS) for p in images], strength=strength,
                  negative_prompt=NEGATIVES, num_inference_steps=8, guidance_scale=4.0, generator=generators(seeds),
                  output_type="np").images
    mine = ours(networks, config, folder)(
        PROMPTS, image=images, strength=strength, negative_prompt=NEGATIVES, steps=8, guidance_scale=4.0, seed=seeds,
        height=32, width=40, scheduler=scheduler, output="numpy")
    assert_same(mine, theirs)


def test_an_image_is_rounded_down_to_whole_latents_as_diffusers_does(networks, folder, images):
    pipe, config = reference(networks, StableDiffusionImg2ImgPipeline)
    odd = images[0].resize((43, 35))
    theirs = pipe("cat", image=odd, num_inference_steps=4, generator=generators([7]), output_type="np").images
    mine = ours(networks, config, folder)("cat", image=odd, steps=4, strength=0.8, seed=7, output="numpy")
    assert mine.shape == (1, 32, 40, 3)
    assert_same(mine, theirs)


def test_an_image_of_a_size_that_the_networks_do_not_take_is_refused(networks, folder, images):
    pipeline = ours(networks, reference(networks)[1], folder)  # of two latents, 8 pixels
    with pytest.raises(InputError, match="image: the image's height of 38 will not do: height is 36, the bundle makes "
                                         r"16 to 128 in steps of 8 \(give height; nearest: 32 or 40"):
        pipeline("cat", image=images[0], steps=2)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_whatever_the_batch_limit_the_images_are_the_same(networks, folder, batch):
    config = reference(networks)[1]
    options: dict[str, Any] = {"steps": 3, "seed": 7, "images_per_prompt": 3, "output": "numpy"}
    whole = ours(networks, config, folder, batch=16)(PROMPTS, **options)
    pipeline = ours(networks, config, folder, batch=batch)
    cut = pipeline(PROMPTS, **options)
    assert psnr(whole, cut) >= 90
    assert max(len(call["sample"]) for call in calls_of(pipeline, "unet")) <= batch
    assert max(len(call["latent_sample"]) for call in calls_of(pipeline, "vae_decoder")) <= batch
