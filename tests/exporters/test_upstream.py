"""diffusers' own pipelines say what a folder's configs mean: corrections by class, defaults by mode, the sampler."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import as_loaded, check_schedulers, open_origin
from exporters.families.open_source import open_source
from exporters.source import diffusers_pipeline
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from runtimes.schedulers import from_config
from tests.exporters.family_pipelines import PIPELINES, write_pipeline_of
from tests.exporters.pipelines import edit_json

SCHEDULER, INDEX, UNET = "scheduler/scheduler_config.json", "model_index.json", "unet/config.json"
CLASSES = {
    "sd2": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "inpaint": (None, None, "StableDiffusionInpaintPipeline"),
    "tiny-decoder": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "xl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "xl-inpaint": (None, None, "StableDiffusionXLInpaintPipeline"),
    "xl-normalized": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
                      "StableDiffusionXLInpaintPipeline"),
    "sd-normalized": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "refiner": (None, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "ldm": ("LDMPipeline", None, None),
    "ldm-text": ("LDMTextToImagePipeline", None, None),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small pipeline, written once; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).is_dir() else write_pipeline_of(name, root / name)


@pytest.fixture
def model(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may edit."""
    return lambda name: Path(shutil.copytree(written(name), tmp_path / name))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PIPELINES)
def test_each_mode_has_the_defaults_of_its_diffusers_class(written, name):
    source = as_loaded(open_source(written(name)))
    classes = {mode: cls for mode, cls in zip(diffusers_pipeline.MODES, CLASSES[name], strict=True) if cls}
    assert {mode: facts.pipeline_class for mode, facts in source.modes.items()} == classes
    for facts in source.modes.values():
        signature = inspect.signature(getattr(diffusers, facts.pipeline_class).__call__).parameters
        for key in ("guidance_scale", "strength"):
            assert getattr(facts, key) == (signature[key].default if key in signature else 1.0)


def test_a_mode_that_diffusers_lacks_has_the_guidance_of_the_one_it_has(written):
    facts = open_origin(BuildSpec(model=str(written("refiner")))).manifest.pipeline
    assert facts.mode(image=False, mask=False).guidance_scale == 5.0
    old = replace(facts, process=replace(facts.process, modes={}))
    assert [old.mode(image, mask).strength for image, mask in ((False, False), (True, False), (True, True))] == [
        1.0, 0.8, 1.0]


@pytest.mark.parametrize(("name", "side"), [("sd2", 64), ("xl", 32)])
def test_old_sample_size_is_corrected_by_the_classes_that_correct_it(model, name, side):
    folder = model(name)
    edit_json(folder / UNET, _diffusers_version="0.6.0", sample_size=32)
    codec = open_origin(BuildSpec(model=str(folder))).manifest.pipeline.codec
    assert (codec.height, codec.width) == (side * codec.factor,) * 2


@pytest.mark.parametrize(("kind", "outdated", "text", "mask"), [
    ("PNDMScheduler", {"skip_prk_steps": False}, {"skip_prk_steps": False}, {"skip_prk_steps": True}),
    ("DDIMScheduler", {"clip_sample": True}, {"clip_sample": False}, {"clip_sample": True}),
    ("DDIMScheduler", {"steps_offset": 0}, {"steps_offset": 1}, {"steps_offset": 1}),
])
def test_outdated_scheduler_keys_are_corrected_by_the_class_of_the_mode(model, kind, outdated, text, mask):
    folder = model("sd2")
    getattr(diffusers, kind)(steps_offset=1).save_pretrained(folder / "scheduler")
    edit_json(folder / INDEX, scheduler=["diffusers", kind])
    edit_json(folder / SCHEDULER, **outdated)
    source = as_loaded(open_source(folder))
    for mode, wanted in (("text", text), ("image", text), ("mask", mask)):
        config = {**source.scheduler_config, **source.modes[mode].scheduler}
        assert {key: config[key] for key in wanted} == wanted, mode


def test_a_default_of_the_scheduler_is_not_carried_over_to_another_class(model):
    folder = model("sd2")
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    (folder / SCHEDULER).write_text(json.dumps(config))
    edit_json(folder / INDEX, scheduler=["diffusers", "PNDMScheduler"])
    ours: Any = from_config(as_loaded(open_source(folder)).scheduler_config, "ddim")
    with diffusers_pipeline.unwarned():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs = diffusers.DDIMScheduler.from_config(pipe.scheduler.config).config
    assert (ours.beta_schedule, ours.steps_offset, ours.clip_sample) == (
        theirs["beta_schedule"], theirs["steps_offset"], theirs["clip_sample"])


def test_model_index_decides_the_sampler(model):
    folder = model("sd2")
    edit_json(folder / INDEX, scheduler=["diffusers", "EulerDiscreteScheduler"])
    source = as_loaded(open_source(folder))
    assert source.scheduler_class == source.scheduler_config["_class_name"] == "EulerDiscreteScheduler"


def test_an_unknown_sampler_is_refused_when_building_with_what_to_name(model):
    folder = model("sd2")
    edit_json(folder / INDEX, scheduler=["diffusers", "RePaintScheduler"])
    with pytest.raises(InputError, match="RePaintScheduler") as caught:
        open_origin(BuildSpec(model=str(folder)))
    assert '"scheduler": ["diffusers", "DDIMScheduler"]' in caught.value.fix


def test_a_scheduler_key_of_unknown_value_is_refused_when_building(model):
    folder = model("sd2")
    edit_json(folder / SCHEDULER, prediction_type="flow")
    with pytest.raises(InputError, match="prediction_type") as caught:
        check_schedulers(as_loaded(open_source(folder)))
    assert caught.value.where == str(folder / SCHEDULER)


@pytest.mark.parametrize("name", ["scheduler", "tokenizer"])
def test_code_of_the_folder_is_never_run(model, name):
    folder = model("sd2")
    edit_json(folder / INDEX, **{name: ["mine", "Mine"]})
    (folder / name / "mine.py").write_text("raise SystemExit('the code of the model ran')")
    with pytest.raises(InputError, match="'mine'"):
        open_source(folder)


def test_what_diffusers_refuses_is_said_in_one_line(model):
    folder = model("sd2")
    edit_json(folder / INDEX, scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(InputError, match="diffusers' StableDiffusionPipeline refuses it"):
        diffusers_pipeline.upstream_pipeline(open_source(folder), "text")


def test_given_components_replace_the_empty_ones(written):
    source = open_source(written("sd2"))
    vae = diffusers.AutoencoderKL.from_pretrained(written("sd2") / "vae")
    pipe = diffusers_pipeline.upstream_pipeline(source, "image", vae=vae)
    assert pipe.vae is vae and pipe.unet.device.type == "meta" and pipe.safety_checker is None
    assert type(pipe).__name__ == "StableDiffusionImg2ImgPipeline" and pipe.tokenizer is not None


def test_diffusers_is_asked_once_for_the_same_configs(written, monkeypatch):
    first = as_loaded(open_source(written("xl")))
    monkeypatch.setattr(diffusers_pipeline, "as_loaded", None)
    assert as_loaded(open_source(written("xl"))) == first


@pytest.mark.parametrize(("part", "key", "value", "words"), [
    ("text_encoder", "use_attention_mask", True, "fed the tokenizer's mask"),
    ("text_encoder", "quantization_config", {"bits": 4}, "weights are quantized"),
    ("text_encoder", "rope_theta", 10000.0, "rope_theta=10000.0 is unknown to CLIPTextModel"),
    ("unet", "frobnicate", 3, "frobnicate=3 is unknown to UNet2DConditionModel"),
    ("vae", "patch_size", 2, "patch_size=2 is unknown to AutoencoderKL"),
    ("unet", "num_class_embeds", 0, "num_class_embeds=0 needs an input"),
    ("unet", "sample_size", [8], r"sample_size is \[8\], expected one number"),
    ("vae", "scaling_factor", None, "scaling_factor is None"),
    ("unet", "time_cond_proj_dim", 8, "time_cond_proj_dim=8 needs an input"),
    ("vae", "in_channels", 4, "in_channels is 4, images have 3 channels"),
])
def test_what_a_config_asks_and_nothing_does_is_refused_by_its_key(model, part, key, value, words):
    folder = model("sd2")
    edit_json(folder / part / "config.json", **{key: value})
    with pytest.raises(InputError, match=words) as caught:
        open_origin(BuildSpec(model=str(folder)))
    assert caught.value.where == str(folder / part / "config.json")


@pytest.mark.parametrize(("file", "key", "value"), [
    (SCHEDULER, "beta_schedule", None), (SCHEDULER, "beta_schedule", "cosine"), (SCHEDULER, "trained_betas", []),
    (SCHEDULER, "num_train_timesteps", -1), ("text_encoder/config.json", "attention_dropout", "x"),
    ("text_encoder/config.json", "hidden_size", -1), ("vae/config.json", "block_out_channels", []),
    (UNET, "conv_in_kernel", -1), (UNET, "norm_num_groups", 0), (INDEX, "feature_extractor", []),
])
def test_a_value_that_the_libraries_stumble_over_is_refused_in_one_line(model, file, key, value):
    folder = model("sd2")
    edit_json(folder / file, **{key: value})
    with pytest.raises(InputError) as caught:
        open_origin(BuildSpec(model=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer"])
def test_xl_with_one_of_tokenizer_and_text_encoder_is_refused(model, name):
    folder = model("xl")
    edit_json(folder / INDEX, **{name: [None, None]})
    with pytest.raises(InputError, match="of text_encoder and tokenizer it has one alone"):
        open_origin(BuildSpec(model=str(folder)))


@pytest.mark.parametrize("value", [None, False])
def test_null_in_model_index_is_false_as_diffusers_takes_it(model, value):
    folder = model("xl")
    edit_json(folder / INDEX, force_zeros_for_empty_prompt=value)
    assert open_origin(BuildSpec(model=str(folder))).manifest.pipeline.conditioner.empty_negative == "text"


@pytest.mark.parametrize(("part", "keys"), [
    ("text_encoder", {"torch_dtype": "float16", "num_beams": 1, "temperature": 1.0, "dropout": 0.1, "top_k": 50}),
    ("unet", {"frobnicate": None, "_note": 3, "time_cond_proj_dim": None}),
    ("vae", {"force_upcast": True, "shift_factor": 0.1}),
])
def test_keys_that_ask_nothing_are_harmless(model, written, part, keys):
    folder = model("sd2")
    before = open_origin(BuildSpec(model=str(folder))).manifest.pipeline
    edit_json(folder / part / "config.json", **keys)
    assert open_origin(BuildSpec(model=str(folder))).manifest.pipeline == before


def test_xls_classes_do_not_look_at_use_attention_mask(model):
    folder = model("xl")
    edit_json(folder / "text_encoder/config.json", use_attention_mask=True)
    assert open_origin(BuildSpec(model=str(folder))).manifest.family == "stable-diffusion-xl"


@pytest.mark.parametrize(("key", "value", "refused"), [
    ("controlnet", ["diffusers", "ControlNetModel"], True), ("unknown_option", True, True),
    ("image_encoder", ["transformers", "CLIPVisionModelWithProjection"], False), ("controlnet", [None, None], False),
    ("requires_aesthetics_score", True, True),
])
def test_what_model_index_asks_and_the_class_does_not_know_is_refused(model, key, value, refused):
    folder = model("sd2")
    edit_json(folder / INDEX, **{key: value})
    if refused:
        with pytest.raises(InputError, match=f"{key}=.* is unknown to StableDiffusionPipeline"):
            open_origin(BuildSpec(model=str(folder)))
    else:
        open_origin(BuildSpec(model=str(folder)))


def test_corrections_are_said(model):
    folder = model("sd2")
    edit_json(folder / UNET, _diffusers_version="0.6.0", sample_size=32)
    edit_json(folder / SCHEDULER, clip_sample=True)
    assert open_origin(BuildSpec(model=str(folder))).manifest.measured["notes"] == [
        "corrected as diffusers does: clip_sample of the scheduler, True -> False (text, image)",
        "corrected as diffusers does: sample_size of the U-Net, 32 -> 64 (text, image, mask)"]


def test_a_bundle_whose_shapes_leave_out_the_models_own_size_makes_another_and_says_so(written):
    spec = BuildSpec(model=str(written("sd2")), shapes={"height": ShapeRange(16, 24, 24)})
    manifest = open_origin(spec).manifest
    assert (manifest.pipeline.codec.height, manifest.pipeline.codec.width) == (24, 32)
    assert "--shapes leave out the model's own 32 x 32" in manifest.measured["notes"][0]


@pytest.mark.parametrize(("sample_size", "shapes", "multiple"), [
    (8, {}, 2), (9, {}, 1), ([8, 9], {}, 1), (9, {"height": "32:32:64", "width": "32"}, 2),
    (8, {"height": "32:36:64"}, 1)])
def test_sizes_that_the_unet_does_not_halve_evenly_are_made_where_they_are_wanted(model, sample_size, shapes, multiple):
    folder = model("sd2")
    edit_json(folder / UNET, sample_size=sample_size)
    manifest = open_origin(BuildSpec(model=str(folder), shapes=shapes)).manifest
    for name in ("height", "width"):
        axis = manifest.components["unet"].axes[name]
        assert axis.multiple == multiple
        assert getattr(manifest.pipeline.codec, name) // manifest.pipeline.codec.factor in axis.range


def test_an_unconditional_unet_refuses_a_size_that_it_cannot_halve(model):
    folder = model("ldm")
    edit_json(folder / UNET, sample_size=17)
    with pytest.raises(InputError, match="sample_size 17 is not a multiple of what the U-Net halves to"):
        open_origin(BuildSpec(model=str(folder)))
