"""Every family against diffusers' own pipeline on the same latents, through the load pass and our sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import runtimes
from calibration.trajectory.recorder import Recording
from deploy.building.builder import load_source
from deploy.building.run_build import run_build
from deploy.core.pass_cache import Cache
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.parity.reference.torch_sessions import reference_sessions
from deploy.parity.reference.trajectories import assemble_pipeline
from runtimes.bundle.folder import Bundle
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from runtimes.inputs.request_fields import SizeConditions
from runtimes.pipeline.diffusion import Pipeline
from tests.deploy.conftest import Cli
from tests.exporters.family_pipelines import make_pipeline
from tests.runtimes.diffusers_reference import psnr

# diffusers 0.42 hands tensors to numpy functions
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
PROMPTS, NEGATIVES = ["a red apple on the house", "a cat"], ["blue", "dog"]
Pair = tuple[Pipeline, Any]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Family -> our pipeline over the loaded source's PyTorch modules, and diffusers' own, with shared weights."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder, theirs = tmp_path_factory.mktemp(name), make_pipeline(name)
            theirs.save_pretrained(folder / "model")
            spec = BuildSpec(model=str(folder / "model"))
            (folder / "work").mkdir()
            bundle = load_source(open_origin(spec), spec, Cache(folder / "cache"), folder / "work")
            made[name] = assemble_pipeline(reference_sessions(bundle), bundle), theirs
        return made[name]

    return get


def noise(pipeline: Pipeline, images: int = 2) -> np.ndarray:
    codec = pipeline.roles.codec
    shape = (images, codec.latent_channels, codec.height // codec.factor,
             codec.width // codec.factor)
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.shape == theirs.shape
    assert theirs.std() > 0.03, "an image without contrast proves nothing"
    assert psnr(mine, theirs) >= 60


def both(pair: Pair, guidance_scale: float = 4.0, *, ours: Any = None, theirs: Any = None, steps: int = 4,
         negatives: Any = NEGATIVES) -> tuple[np.ndarray, np.ndarray]:
    """Generate with both: extra arguments are given to one of them."""
    pipeline, reference = pair
    latents = noise(pipeline)
    mine = pipeline(PROMPTS, negative_prompt=negatives, steps=steps, guidance_scale=guidance_scale,
                    output="numpy", **{"latents": latents, **(ours or {})})
    other = reference(PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="np",
                      **{"negative_prompt": negatives, "latents": torch.from_numpy(latents), **(theirs or {})}).images
    return mine, other


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_xl_is_generated_as_diffusers_does(guidance_scale: float, pair: Callable[[str], Pair]) -> None:
    assert_same(*both(pair("xl"), guidance_scale))


def test_an_empty_negative_prompt_is_zeros_for_xl(pair: Callable[[str], Pair]) -> None:
    assert_same(*both(pair("xl"), negatives=None))
    mine, other = both(pair("xl"), negatives=None, theirs={"negative_prompt": ""})
    assert psnr(mine, other) < 60  # diffusers encodes an empty string that is given


@pytest.mark.parametrize(("family", "mode"), [
    *((family, mode) for family in ("xl", "xl-normalized", "sd2", "sd-normalized")
      for mode in ("text", "image", "mask")),
    ("xl-inpaint", "mask"), ("inpaint", "mask")])
def test_every_mode_is_generated_with_the_defaults_of_its_diffusers_class(
    family: str, mode: str, pair: Callable[[str], Pair]
) -> None:
    """Strength, guidance and normalized latents: XL's classes look at the channels' mean and deviation, SD's do not."""
    pipeline, reference = pair(family)
    kind = {"text": diffusers.AutoPipelineForText2Image, "image": diffusers.AutoPipelineForImage2Image,
            "mask": diffusers.AutoPipelineForInpainting}[mode]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32))
    mask = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))
    given: dict[str, Any] = {"text": {}, "image": {"image": image}, "mask": {"image": image, "mask": mask}}[mode]
    theirs = {{"mask": "mask_image"}.get(key, key): value for key, value in given.items()}
    sizes = {"height": 32, "width": 32} if mode == "mask" else {}  # else diffusers' class enlarges the image
    mine = pipeline("a cat", seed=[5], steps=12, output="numpy", **given)
    pipe = kind.from_pipe(reference)
    pipe.set_progress_bar_config(disable=True)
    other = pipe("a cat", generator=[torch.Generator().manual_seed(5)], num_inference_steps=12, output_type="np",
                 **theirs, **sizes).images
    assert_same(mine, other)


def test_xl_from_an_image_gets_the_crop_in_both_branches(pair: Callable[[str], Pair]) -> None:
    pipeline, reference = pair("xl")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    mine = pipeline("a cat", seed=[5], steps=8, strength=0.9, image=image, output="numpy",
                    sizes=SizeConditions(crop=(300, 500)))
    other = diffusers.AutoPipelineForImage2Image.from_pipe(reference)(
        "a cat", generator=[torch.Generator().manual_seed(5)], num_inference_steps=8, strength=0.9, image=image,
        crops_coords_top_left=(300, 500), output_type="np").images
    assert_same(mine, other)


def test_xl_gets_sizes_and_crops(pair: Callable[[str], Pair]) -> None:
    mine, other = both(pair("xl"), ours={"sizes": SizeConditions(original=(64, 48), crop=(3, 5), target=(40, 24))},
                       theirs={"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (40, 24)})
    assert_same(mine, other)
    assert psnr(mine, both(pair("xl"))[0]) < 40


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_xl_turbo_and_lcm_schedulers(kind: str, pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, reference = pair("xl")
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "_class_name": kind,
              "timestep_spacing": "trailing"}
    monkeypatch.setattr(pipeline, "_config", config)
    monkeypatch.setattr(pipeline, "_schedulers", {})
    monkeypatch.setattr(reference, "scheduler", getattr(diffusers, kind).from_config(config))
    # One step, as Turbo takes it: no fresh noise is sampled.
    mine, other = both((pipeline, reference), 1.0, steps=1)
    assert_same(mine, other)


def test_the_refiner_takes_over_where_the_base_stops(pair: Callable[[str], Pair]) -> None:
    (base, base_reference), (refiner, refiner_reference) = pair("xl"), pair("refiner")
    steps, share = 10, 0.7
    common: dict[str, Any] = {"steps": steps, "guidance_scale": 4.0, "negative_prompt": NEGATIVES}
    given = {"num_inference_steps": steps, "guidance_scale": 4.0, "negative_prompt": NEGATIVES}
    latents = noise(base)
    mine = base(PROMPTS, latents=latents, output="latents", part=(0, share), **common)
    other = base_reference(PROMPTS, latents=torch.from_numpy(latents), output_type="latent", denoising_end=share,
                           **given).images
    assert psnr(mine, other.numpy()) >= 60
    assert psnr(mine, base(PROMPTS, latents=latents, output="latents", **common)) < 40
    finished = refiner(PROMPTS, latents=mine, output="numpy", part=(share, 1), **common)
    expected = refiner_reference(PROMPTS, image=other, denoising_start=share, output_type="np", **given).images
    assert_same(finished, expected)
    other_score = refiner(PROMPTS, latents=mine, output="numpy", part=(share, 1),
                          sizes=SizeConditions(aesthetic_score=1.0), **common)
    assert psnr(finished, other_score) < 60


@pytest.mark.parametrize(("part", "words"), [
    ((0.5, 0.5), "not an interval within 0 to 1"), ((0, 1.5), "not an interval"), (3, "not a pair"),
    ((0.5, 1), "starts from latents"),
])
def test_impossible_parts(part: Any, words: str, pair: Callable[[str], Pair]) -> None:
    with pytest.raises(InputError, match=words):
        pair("xl")[0]("a cat", steps=4, part=part)


def test_a_first_part_without_a_step_hands_on_the_noise_as_diffusers_does(pair: Callable[[str], Pair]) -> None:
    mine, theirs = pair("xl")
    latents = mine("a cat", steps=4, part=(0, 0.001), seed=3, output="latents")
    expected = theirs("a cat", num_inference_steps=4, denoising_end=0.001, output_type="latent",
                      generator=torch.Generator().manual_seed(3)).images
    np.testing.assert_array_equal(latents, expected.numpy())


def test_stable_diffusion_2_predicts_v_and_upcasts_attention(pair: Callable[[str], Pair]) -> None:
    assert_same(*both(pair("sd2")))


def test_the_tiny_autoencoder_decodes(pair: Callable[[str], Pair]) -> None:
    assert_same(*both(pair("tiny-decoder")))


def test_the_tiny_autoencoder_encodes_without_generating(pair: Callable[[str], Pair]) -> None:
    pipeline, reference = pair("tiny-decoder")
    image = np.random.default_rng(5).random((32, 32, 3)).astype(np.float32)
    from runtimes.codec import autoencoder

    pixels = image.transpose(2, 0, 1)[None] * 2 - 1
    mean, deviation = autoencoder.encode(pipeline.sessions["vae_encoder"], pixels, pipeline.roles.codec)
    assert deviation is None
    with torch.no_grad():
        expected = reference.vae.encode(torch.from_numpy(pixels)).latents.numpy()
    np.testing.assert_allclose(mean, expected, atol=1e-5)


def test_latent_diffusion_from_text_by_ldmbert(pair: Callable[[str], Pair]) -> None:
    pipeline, reference = pair("ldm-text")
    latents = noise(pipeline)
    mine = pipeline(PROMPTS, steps=4, guidance_scale=4.0, latents=latents, output="numpy")
    other = reference(PROMPTS, num_inference_steps=4, guidance_scale=4.0, latents=torch.from_numpy(latents), eta=0.0,
                      output_type="np").images
    assert_same(mine, other)


def test_unconditional_latent_diffusion_with_a_codebook(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, reference = pair("ldm")
    latents = noise(pipeline)
    monkeypatch.setattr(
        "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond.randn_tensor",
        lambda *_, **__: torch.from_numpy(latents))
    mine = pipeline(["", ""], steps=4, latents=latents, output="numpy")
    assert_same(mine, reference(batch_size=2, num_inference_steps=4, output_type="np").images)
    with torch.no_grad():
        unquantized = reference.vqvae.decode(torch.from_numpy(latents), force_not_quantize=True).sample
        quantized = reference.vqvae.decode(torch.from_numpy(latents)).sample
    assert not torch.allclose(unquantized, quantized, atol=0.1)  # the codebook matters


def test_an_unconditional_model_refuses_a_prompt(pair: Callable[[str], Pair]) -> None:
    with pytest.raises(InputError, match="generates without prompts"):
        pair("ldm")[0]("a cat", steps=2)


def build(name: str, folder: Path, cache: Path, **options: Any) -> Path:
    theirs = make_pipeline(name)
    theirs.save_pretrained(folder / "model")
    shapes = {"batch": ShapeRange(1, 1, 2), "height": ShapeRange(32, 32, 64), "width": ShapeRange(32, 32, 64)}
    spec = BuildSpec(model=str(folder / "model"), shapes=shapes, prompts=("a red apple", "cat"), **options)
    return run_build(spec, folder / "bundle", cache_root=cache).bundle.path


def assert_built(bundle: Path, components: list[str]) -> None:
    manifest = Bundle.open(bundle).manifest
    assert sorted(manifest.components) == components
    for name, component in manifest.components.items():
        assert component.parity is not None and component.parity["relative_l2"] <= 1e-4, name
    assert manifest.verified and manifest.parity is not None
    assert manifest.parity["images"]["psnr_db"] >= 50 and not manifest.parity["unverified"]


def test_xl_builds_and_generates_without_pytorch(tmp_path: Path, build_cache: Path) -> None:
    bundle = build("xl", tmp_path, build_cache)
    assert_built(bundle, ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"])
    pipeline = runtimes.load(bundle)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    assert_same(*both((pipeline, theirs)))


@pytest.mark.parametrize(("name", "components"), [
    ("ldm", ["unet", "vae_decoder", "vae_encoder"]),
    ("ldm-text", ["text_encoder", "unet", "vae_decoder", "vae_encoder"]),
])
def test_latent_diffusion_builds(name: str, components: list[str], tmp_path: Path, cli: Cli, build_cache: Path) -> None:
    bundle = build(name, tmp_path, build_cache)
    assert_built(bundle, components)
    prompt = [] if name == "ldm" else ["a red apple"]
    assert cli("generate", bundle, *prompt, "--steps", "2", "-o", tmp_path / "image.png").code == 0
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize("name", ["sd2", "inpaint", "tiny-decoder", "refiner"])
def test_the_other_families_build(name: str, tmp_path: Path, cli: Cli, build_cache: Path) -> None:
    encoder = "text_encoder_2" if name == "refiner" else "text_encoder"
    bundle = build(name, tmp_path, build_cache)
    assert_built(bundle, [encoder, "unet", "vae_decoder", "vae_encoder"])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    options = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"] if name == "inpaint" else []
    run = cli("generate", bundle, "a red apple", *options, "--steps", "2", "-o", tmp_path / "image.png")
    assert run.code == 0, run
    assert (tmp_path / "image.png").is_file()


def test_int8_of_a_unet_for_inpainting_is_calibrated_under_masks(tmp_path: Path, build_cache: Path) -> None:
    """The graphs are those of the test before, from the cache."""
    manifest = Bundle.open(build("inpaint", tmp_path, build_cache, precision="int8", calibration_samples=24,
                                 verify="components")).manifest
    quantized = next(p for p in manifest.passes if p.name == "quantize")
    assert quantized.config["calibration"]["inpaints"] is True
    summary = manifest.components["unet"].graph.quantization
    assert summary is not None and summary.layers["w8a8"] > 0
    assert manifest.parity is not None and not manifest.parity["broken"]
    recorded = Recording(build_cache / "calibration" / summary.recording, 3, summary.recording)
    fed = np.concatenate([call["sample"] for call in recorded.calls("unet")])
    assert len(fed) == 2 * 24
    masks, masked = fed[:, 4], fed[:, 5:]
    assert set(np.unique(masks)) == {0, 1}
    assert len(np.unique(masks.mean(axis=(1, 2)))) == 4  # all of it, and one mask an episode
    assert len(np.unique(masked.round(4), axis=0)) == 6  # grey and an image with a hole, encoded once an episode
