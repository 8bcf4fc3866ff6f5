"""Modes of a finished bundle against diffusers' own pipeline of its source, with the same seeds.

Inpainting is compared in tests/runtimes/test_modes_diffusers.py: diffusers refuses it for this model's 8 channels.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import runtimes
from deploy.reference_models import WEIGHTS
from tests.runtimes.diffusers_reference import assert_same, generators

# diffusers 0.42 hands tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SEEDS = [5, 9]
STEPS = 10
NEGATIVES = ["blurry", "green"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64))
# mode -> diffusers' class, what it is given besides, what we are
MODES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "text to image": (diffusers.StableDiffusionPipeline, {}, {}),
    "negative prompt": (diffusers.StableDiffusionPipeline, {"negative_prompt": NEGATIVES},
                        {"negative_prompt": NEGATIVES}),
    "image to image": (diffusers.StableDiffusionImg2ImgPipeline, {"image": [IMAGE] * 2, "strength": 0.6},
                       {"image": IMAGE, "strength": 0.6}),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_generates_what_diffusers_generates_of_its_source(reference_bundle, mode):
    kind, given_theirs, given = MODES[mode]
    source = kind.from_pretrained(WEIGHTS, safety_checker=None, dtype=torch.float32)
    source.set_progress_bar_config(disable=True)
    prompts = ["a red apple", "a cat"]
    theirs = source(prompts, num_inference_steps=STEPS, guidance_scale=5.0, output_type="np",
                    generator=generators(SEEDS), **given_theirs).images
    pipeline = runtimes.load(reference_bundle, threads=1, check_hashes=False)
    assert_same(pipeline(prompts, steps=STEPS, guidance_scale=5.0, seed=SEEDS, output="numpy", **given), theirs)
