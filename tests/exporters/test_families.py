"""What a family says of a pipeline follows from its configs; what the pipeline cannot feed is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters.families import FAMILIES, family_of
from exporters.families.open_source import open_source
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from tests.exporters.pipelines import TOKENS, edit_json
from tests.runtimes.roles import stable_diffusion as sd_roles


def test_components_and_axes_follow_from_the_configs(pristine: Path) -> None:
    source = open_source(pristine)
    specs = family_of(source.pipeline_class).components(source, {})
    assert {name: spec.source_component for name, spec in specs.items()} == {
        "text_encoder": "text_encoder", "unet": "unet", "vae_encoder": "vae", "vae_decoder": "vae"}
    unet = specs["unet"]
    assert {t.name: (t.dtype, t.shape) for t in (*unet.inputs, *unet.outputs)} == {
        "sample": ("float32", ("batch", 4, "height", "width")),
        "timestep": ("float32", ("batch",)),
        "encoder_hidden_states": ("float32", ("batch", "sequence", 24)),
        "out_sample": ("float32", ("batch", 4, "height", "width")),
    }
    assert (unet.axes["height"].range, unet.axes["height"].multiple) == (ShapeRange(2, 8, 32), 2)
    assert unet.axes["batch"].range == ShapeRange(1, 2, 16)
    assert unet.axes["sequence"].range == ShapeRange(1, TOKENS, TOKENS)
    assert specs["vae_decoder"].axes["batch"].range == ShapeRange(1, 1, 8)
    assert (specs["vae_encoder"].axes["image_width"].range, specs["vae_encoder"].axes["image_width"].multiple) == (
        ShapeRange(16, 64, 256), 16)
    for spec in specs.values():
        named = {d for t in (*spec.inputs, *spec.outputs) for d in t.shape if isinstance(d, str)}
        assert named == set(spec.axes)


def test_roles(pristine: Path) -> None:
    source = open_source(pristine)
    assert family_of(source.pipeline_class).roles(source) == sd_roles(4, 8, 0.18215, 64, 64, TOKENS)


def test_shapes_are_in_images_and_pixels(pristine: Path) -> None:
    source = open_source(pristine)
    specs = family_of(source.pipeline_class).components(
        source, {"batch": ShapeRange(1, 2, 4), "height": ShapeRange(64, 128, 512), "sequence": ShapeRange(5, 9, 9)})
    assert specs["unet"].axes["batch"].range == ShapeRange(1, 4, 8)
    assert specs["unet"].axes["height"].range == ShapeRange(8, 16, 64)
    assert specs["unet"].axes["width"].range == ShapeRange(2, 8, 32)
    assert specs["unet"].axes["sequence"].range == ShapeRange(5, 9, 9)
    assert specs["vae_decoder"].axes["image_height"].range == ShapeRange(64, 128, 512)


@pytest.mark.parametrize(("shapes", "words"), [
    ({"hight": ShapeRange(1, 1, 1)}, "unknown axis hight .*batch, height, width, sequence"),
    ({"height": ShapeRange(64, 64, 100)}, "height=100 pixels is not a multiple of 8 .*for example 96"),
    ({"sequence": ShapeRange(1, 77, 77)}, "sequence=77 is longer than the text encoder's 20 positions"),
])
def test_impossible_shapes(shapes: dict[str, ShapeRange], words: str, pristine: Path) -> None:
    source = open_source(pristine)
    with pytest.raises(InputError, match=words):
        family_of(source.pipeline_class).components(source, shapes)


@pytest.mark.parametrize(("component", "changes", "words"), [
    ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep' needs an input"),
    ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time' needs an input"),
    ("unet", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj' needs an input"),
    ("unet", {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8}, "encoder_hid_dim is 8, the text encoder's"),
    ("unet", {"cross_attention_dim": [24, 8]}, r"cross_attention_dim is \[24, 8\]"),
    ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256 needs an input"),
    ("unet", {"in_channels": 9}, "in_channels is 9, the VAE has 4 latent channels: an inpainting U-Net"),
    ("unet", {"out_channels": 8}, "out_channels is 8"),
    ("unet", {"cross_attention_dim": 768}, "cross_attention_dim is 768, the text encoder's hidden_size 24"),
    ("unet", {"block_out_channels": None}, "block_out_channels is None"),
    ("vae", {"latent_channels": "4"}, "latent_channels is '4'"),
    ("text_encoder", {"max_position_embeddings": ...}, "max_position_embeddings is None"),
])
def test_config_that_the_pipeline_cannot_feed(
    component: str, changes: dict[str, Any], words: str, pipeline: Path
) -> None:
    edit_json(pipeline / component / "config.json", **changes)
    source = open_source(pipeline)
    with pytest.raises(InputError, match=words):
        family_of(source.pipeline_class).components(source, {})


def test_other_network_class_is_refused(pipeline: Path) -> None:
    edit_json(pipeline / "model_index.json", vae=["diffusers", "VQModel"])
    source = open_source(pipeline)
    with pytest.raises(InputError, match=r"vae is a VQModel.*AutoencoderKL or AutoencoderTiny"):
        family_of(source.pipeline_class).roles(source)


def test_every_known_class_has_a_family() -> None:
    assert {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"} <= set(FAMILIES)


def test_a_unet_built_for_long_prompts_takes_windows_that_its_text_encoder_does_not(pristine: Path) -> None:
    source = open_source(pristine)
    specs = family_of(source.pipeline_class).components(source, {"sequence": ShapeRange(1, TOKENS, 3 * TOKENS)})
    assert specs["unet"].axes["sequence"].range == ShapeRange(1, TOKENS, 3 * TOKENS)
    assert specs["text_encoder"].axes["sequence"].range == ShapeRange(1, TOKENS, TOKENS)
