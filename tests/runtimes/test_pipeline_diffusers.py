"""The whole pipeline against diffusers' own, over the very same networks: what differs is only our loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtimes.manifest import PipelineFacts
from runtimes.noise import NoiseStreams
from runtimes.pipeline import Pipeline
from runtimes.tensors import Axis, ShapeRange, TensorSpec
from runtimes.tokenizer import ClipTokenizer, prepare_tokenizer
from tests.runtimes.fakes import FakeSession, axes, calls_of, component
from tests.runtimes.vocabulary import make_vocabulary

TOKENS, WIDTH, CHANNELS, FACTOR = 16, 16, 4, 4
NETWORKS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm++": "DPMSolverMultistepScheduler",
            "euler-ancestral": "EulerAncestralDiscreteScheduler", "unipc": "UniPCMultistepScheduler",
            "pndm": "PNDMScheduler", "lcm": "LCMScheduler"}
PROMPTS = ["a red apple on the house", "grinning cat, 3d!"]
NEGATIVES = ["blue", "crying dog"]
# diffusers 0.42 hands tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other on several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def networks(folder) -> Iterator[dict[str, object]]:
    torch.manual_seed(0)
    vocab, merges = make_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / "theirs")
    prepare_tokenizer(folder / "theirs", folder / "ours")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), latent_channels=CHANNELS, norm_num_groups=8, sample_size=32,
        scaling_factor=0.35)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 6  # random weights paint grey; the pictures here must have contrast
        unet.conv_out.weight *= 3
        for layer in unet.modules():
            if isinstance(layer, diffusers.models.attention_processor.Attention) and layer.is_cross_attention:
                layer.to_out[0].weight *= 20  # so that prompts and guidance matter
    for network in (text_encoder, unet, vae):
        network.eval()
    yield {"text_encoder": text_encoder, "unet": unet, "vae": vae, "tokenizer": tokenizer}


def reference(networks, kind=StableDiffusionPipeline, prediction="epsilon", scheduler="ddim"):
    config = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                           set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    pipe = kind(**networks, scheduler=config, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False)
    config = {"_class_name": "DDIMScheduler", **pipe.scheduler.config}
    if scheduler == "pndm":  # as Stable Diffusion's PNDM configs have it
        config["skip_prk_steps"] = True
    if scheduler != "ddim":
        pipe.scheduler = getattr(diffusers, NETWORKS[scheduler]).from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, config


def ours(networks, config, folder, batch: int = 8) -> Pipeline:
    """Our pipeline over the same modules."""
    rows, latent = ShapeRange(1, 1, batch), ShapeRange(4, 8, 32)
    vae = networks["vae"]

    def numpy_in(function):
        def run(**feeds):
            with torch.no_grad():
                return function(**{k: torch.from_numpy(np.array(v)) for k, v in feeds.items()}).numpy()
        return run

    def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, dtype, ("batch", *shape))

    hidden, grid = spec("last_hidden_state", TOKENS, WIDTH), ("height", "width")
    parts = {
        "text_encoder": (
            lambda input_ids: networks["text_encoder"](input_ids)[0],
            component((spec("input_ids", TOKENS, dtype="int64"),), (hidden,), {"batch": Axis("prompts", rows)})),
        "unet": (
            lambda sample, timestep, encoder_hidden_states: networks["unet"](
                sample, timestep, encoder_hidden_states).sample,
            component((spec("sample", CHANNELS, *grid), spec("timestep"),
                       spec("encoder_hidden_states", TOKENS, WIDTH)),
                      (spec("out_sample", CHANNELS, *grid),), axes(rows, latent, 2))),
        "vae_encoder": (
            lambda sample: vae.encode(sample).latent_dist.parameters,
            component((spec("sample", 3, *grid),), (spec("latent_parameters", 8, "h", "w"),),
                      axes(rows, ShapeRange(16, 32, 128), 4))),
        "vae_decoder": (
            lambda latent_sample: vae.decode(latent_sample).sample,
            component((spec("latent_sample", CHANNELS, *grid),), (spec("sample", 3, "h", "w"),), axes(rows, latent))),
    }
    sessions = {name: FakeSession(name, part, numpy_in(function)) for name, (function, part) in parts.items()}
    facts = PipelineFacts(CHANNELS, FACTOR, vae.config.scaling_factor, 32, 32, TOKENS)
    return Pipeline(sessions, facts, config, ClipTokenizer.load(folder / "ours", TOKENS))


def share_noise(monkeypatch, seeds) -> None:
    """Every random number that diffusers draws comes from the streams of our seeds, in the order it asks."""
    streams = NoiseStreams(seeds)

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        return torch.from_numpy(streams.draw(tuple(shape[1:])))

    for module in ("schedulers.scheduling_ddim", "schedulers.scheduling_euler_ancestral_discrete",
                   "schedulers.scheduling_lcm", "schedulers.scheduling_dpmsolver_multistep",
                   "models.autoencoders.vae", "pipelines.stable_diffusion.pipeline_stable_diffusion",
                   "pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", randn_tensor)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20)))


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.shape == theirs.shape and mine.dtype == np.float32
    assert theirs.std() > 0.05, "a picture without contrast proves nothing"
    assert psnr(mine, theirs) >= 60


CASES = [
    ("ddim", "epsilon", 0.0), ("ddim", "epsilon", 1.0), ("ddim", "v_prediction", 0.0), ("euler", "epsilon", 0.0),
    ("euler", "v_prediction", 0.0), ("euler-ancestral", "epsilon", 0.0), ("dpm++", "epsilon", 0.0),
    ("dpm++", "v_prediction", 0.0), ("unipc", "epsilon", 0.0), ("pndm", "epsilon", 0.0), ("lcm", "epsilon", 0.0),
]


@pytest.mark.parametrize(("scheduler", "prediction", "eta"), CASES)
def test_text_to_image_equals_diffusers(networks, folder, monkeypatch, scheduler, prediction, eta):
    pipe, config = reference(networks, prediction=prediction, scheduler=scheduler)
    seeds = [11, 5]
    share_noise(monkeypatch, seeds)
    theirs = pipe(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=6, guidance_scale=5.0, height=32, width=40,
                  eta=eta, output_type="np").images
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
    latents = NoiseStreams([1]).draw((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=scale, latents=torch.from_numpy(latents),
                  output_type="np").images
    pipeline = ours(networks, config, folder)
    assert_same(pipeline(PROMPTS[0], steps=3, guidance_scale=scale, latents=latents, output="numpy"), theirs)
    assert {len(call["sample"]) for call in calls_of(pipeline, "unet")} == {2 if scale > 1 else 1}


def test_pil_output_and_several_images_per_prompt_equal_diffusers(networks, folder):
    pipe, config = reference(networks)
    latents = NoiseStreams([1, 2, 3, 4]).draw((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS, num_inference_steps=3, num_images_per_prompt=2, latents=torch.from_numpy(latents)).images
    mine = ours(networks, config, folder)(PROMPTS, steps=3, images_per_prompt=2, latents=latents)
    for a, b in zip(mine, theirs, strict=True):
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_latents_output_equals_diffusers(networks, folder):
    pipe, config = reference(networks, scheduler="euler")
    latents = NoiseStreams([1]).draw((CHANNELS, 8, 8))
    theirs = pipe(PROMPTS[0], num_inference_steps=5, latents=torch.from_numpy(latents), output_type="latent").images
    mine = ours(networks, config, folder)(PROMPTS[0], steps=5, latents=latents, scheduler="euler", output="latents")
    assert np.linalg.norm(mine - theirs.numpy()) <= 1e-5 * np.linalg.norm(theirs.numpy())


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize((45, 38)) for _ in range(2)]


@pytest.mark.parametrize(("scheduler", "prediction", "strength"), [
    ("ddim", "epsilon", 0.8), ("ddim", "v_prediction", 0.35), ("ddim", "epsilon", 1.0), ("euler", "epsilon", 0.6),
    ("euler-ancestral", "epsilon", 0.5), ("dpm++", "epsilon", 0.7), ("unipc", "epsilon", 0.5), ("pndm", "epsilon", 0.6),
    ("lcm", "epsilon", 0.9),
])
def test_image_to_image_equals_diffusers(networks, folder, pictures, monkeypatch, scheduler, prediction, strength):
    pipe, config = reference(networks, StableDiffusionImg2ImgPipeline, prediction, scheduler)
    seeds = [21, 22]
    share_noise(monkeypatch, seeds)
    theirs = pipe(PROMPTS, image=[p.resize((40, 32), Image.Resampling.LANCZOS) for p in pictures], strength=strength,
                  negative_prompt=NEGATIVES, num_inference_steps=8, guidance_scale=4.0, output_type="np").images
    mine = ours(networks, config, folder)(
        PROMPTS, image=pictures, strength=strength, negative_prompt=NEGATIVES, steps=8, guidance_scale=4.0, seed=seeds,
        height=32, width=40, scheduler=scheduler, output="numpy")
    assert_same(mine, theirs)


def test_an_image_is_rounded_down_to_a_size_the_networks_take(networks, folder, pictures):
    mine = ours(networks, reference(networks)[1], folder)("", image=pictures[0], steps=2, seed=0, output="numpy")
    assert mine.shape == (1, 32, 40, 3)  # from 38 x 45, in steps of 4 pixels per latent and 2 latents


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
