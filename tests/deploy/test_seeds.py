"""A seed makes the image that diffusers makes of it: Stable Diffusion XL in every mode, through the load pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from deploy.building.builder import load_source
from deploy.core.pass_cache import Cache
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.parity.reference.torch_sessions import reference_sessions
from deploy.parity.reference.trajectories import assemble_pipeline
from runtimes.pipeline.diffusion import Pipeline
from tests.exporters.family_pipelines import make_pipeline
from tests.runtimes.diffusers_reference import psnr

# diffusers 0.42 hands tensors to numpy functions
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32))
MASK = Image.fromarray(np.pad(np.full((20, 13), 255, np.uint8), ((6, 6), (3, 16))))
MODES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("StableDiffusionXLPipeline", {}, {}),
    "image": ("StableDiffusionXLImg2ImgPipeline", {"image": IMAGE, "strength": 0.6}, {}),
    "mask": ("StableDiffusionXLInpaintPipeline", {"image": IMAGE, "strength": 0.7}, {"mask_image": MASK}),
    "mask, from noise": ("StableDiffusionXLInpaintPipeline", {"image": IMAGE, "strength": 1.0}, {"mask_image": MASK}),
}
SCHEDULERS = {"ddim": ("DDIMScheduler", 0.0), "ddim, eta": ("DDIMScheduler", 0.6), "lcm": ("LCMScheduler", 0.0),
              "euler-ancestral": ("EulerAncestralDiscreteScheduler", 0.0)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Any]:
    return make_pair("xl", tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def inpainting_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Any]:
    return make_pair("xl-inpaint", tmp_path_factory.mktemp("xl-inpaint"))


def make_pair(name: str, folder: Path) -> tuple[Pipeline, Any]:
    """Our pipeline over the source's PyTorch modules, and diffusers' own."""
    theirs = make_pipeline(name)
    theirs.save_pretrained(folder / "model")
    spec = BuildSpec(model=str(folder / "model"))
    (folder / "work").mkdir()
    bundle = load_source(open_origin(spec), spec, Cache(folder / "cache"), folder / "work")
    theirs.scheduler = type(theirs.scheduler).from_pretrained(folder / "model" / "scheduler")
    return assemble_pipeline(reference_sessions(bundle), bundle), theirs


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", MODES)
def test_xl_makes_the_image_of_a_seed_that_diffusers_makes(pair, mode, scheduler):
    pipeline, source = pair
    assert_same_image(pipeline, source, mode, scheduler)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", ["mask", "mask, from noise"])
def test_an_xl_model_trained_for_inpainting_does_too(inpainting_pair, mode, scheduler):
    pipeline, source = inpainting_pair
    assert_same_image(pipeline, source, mode, scheduler)


def assert_same_image(pipeline: Pipeline, source: Any, mode: str, scheduler: str) -> None:
    kind, common, given = MODES[mode]
    name, eta = SCHEDULERS[scheduler]
    reference = getattr(diffusers, kind)(**source.components, add_watermarker=False)
    reference.scheduler = getattr(diffusers, name).from_config(source.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    ours: dict[str, Any] = {"mask": MASK} if given else {}
    mine = pipeline("a cat", steps=4, guidance_scale=4.0, seed=7, scheduler=scheduler.split(",")[0], eta=eta,
                    output="numpy", **common, **ours)
    theirs = reference("a cat", num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
                       eta=eta, output_type="np", **common, **given).images
    assert theirs.std() > 0.03, "an image without contrast proves nothing"
    print(f"{psnr(mine, theirs):.1f} dB")  # seen with `pytest -s -v`
    assert psnr(mine, theirs) >= 60
