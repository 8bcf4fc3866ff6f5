"""Every weight of the file is used, every weight of the model filled, in the layouts of old and new releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters.families.open_source import open_source
from runtimes.bundle.roles import Role
from runtimes.errors import InputError
from tests.exporters.pipelines import edit_json, edit_weights, to_old_layout

FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
         "text_encoder": "text_encoder/model.safetensors"}


def load(pipeline: Path, name: str) -> Any:
    from exporters.source.networks import load_module

    component = open_source(pipeline).components[name]
    return load_module(component.folder, component.library, component.class_name)


def check(pipeline: Path, name: str) -> None:
    from exporters.source.networks import check_weights

    component = open_source(pipeline).components[name]
    check_weights(component.folder, component.library, component.class_name)


def test_a_sound_model_passes_the_check_of_its_weights(pristine: Path, pipeline: Path) -> None:
    to_old_layout(pipeline)
    for folder in (pristine, pipeline):
        for name in FILES:
            check(folder, name)


def test_old_and_new_layout_give_the_same_weights(pristine: Path, pipeline: Path) -> None:
    import torch

    to_old_layout(pipeline)
    for name in ("text_encoder", "vae"):
        new, old = load(pristine, name).state_dict(), load(pipeline, name).state_dict()
        assert list(new) == list(old)
        assert all(torch.equal(new[key], old[key]) for key in new)


@pytest.mark.parametrize("name", FILES)
def test_equals_what_the_libraries_load(name: str, pristine: Path) -> None:
    import diffusers
    import torch
    import transformers

    from exporters.quiet import quiet

    component = open_source(pristine).components[name]
    library: Any = {"diffusers": diffusers, "transformers": transformers}[component.library]
    with quiet():
        theirs = getattr(library, component.class_name).from_pretrained(component.folder)
    ours = load(pristine, name)
    assert not ours.training
    buffers = {**dict(theirs.named_buffers()), **theirs.state_dict()}
    for key, value in {**dict(ours.named_buffers()), **ours.state_dict()}.items():
        assert torch.equal(value, buffers[key]), key


def test_half_precision_weights_become_float32(pipeline: Path) -> None:
    edit_weights(pipeline / FILES["vae"], lambda tensors: {k: v.half() for k, v in tensors.items()})
    assert {str(p.dtype) for p in load(pipeline, "vae").parameters()} == {"torch.float32"}


def drop(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if k != key}


@pytest.mark.parametrize(("name", "change", "words"), [
    ("unet", lambda t: drop(t, "conv_in.bias"), "the file lacks conv_in.bias"),
    ("text_encoder", lambda t: drop(t, "final_layer_norm.weight"), "the file lacks final_layer_norm.weight"),
    ("vae", lambda t: {**t, "surplus.weight": t["quant_conv.bias"]}, "AutoencoderKL has no place for surplus.weight"),
    ("unet", lambda t: {f"unet.{k}": v for k, v in t.items()}, "more; UNet2DConditionModel has no place for unet."),
    ("unet", lambda t: {**t, "conv_in.bias": t["conv_in.bias"][:-1]},
     r"conv_in.bias has shape \(15,\), the config asks for \(16,\)"),
    ("unet", lambda t: {**t, "conv_out.bias": t["conv_out.bias"] * float("nan")}, "conv_out.bias holds NaN"),
    ("vae", lambda t: {**t, "quant_conv.bias": t["quant_conv.bias"] + float("inf")}, "quant_conv.bias holds infinity"),
    ("unet", lambda t: {**t, "conv_in.bias": t["conv_in.bias"].int()}, "conv_in.bias is torch.int32"),
])
def test_misfit_names_the_weight(name: str, change: Any, words: str, pipeline: Path) -> None:
    edit_weights(pipeline / FILES[name], change)
    for read in (load, check):
        with pytest.raises(InputError, match=words) as caught:
            read(pipeline, name)
        assert name in caught.value.where


def test_the_same_weight_under_two_names_is_refused(pipeline: Path) -> None:
    edit_weights(pipeline / FILES["text_encoder"],
                 lambda t: {**t, "text_model.final_layer_norm.bias": t["final_layer_norm.bias"]})
    with pytest.raises(InputError, match=r"no place for .*final_layer_norm\.bias"):
        load(pipeline, "text_encoder")


@pytest.mark.parametrize(("changes", "words"), [
    ({"block_out_channels": [16, 48]}, "the config asks for"),
    ({"block_out_channels": [16]}, "cannot be built from its config"),
])
def test_config_of_another_model(changes: dict[str, Any], words: str, pipeline: Path) -> None:
    edit_json(pipeline / "unet" / "config.json", **changes)
    with pytest.raises(InputError, match=words):
        load(pipeline, "unet")


def test_unknown_network_class(pipeline: Path) -> None:
    from exporters.source.networks import load_module

    for library, name in (("diffusers", "UNet9D"), ("diffusers", "DDIMScheduler"), ("os", "path")):
        with pytest.raises(InputError, match=name):
            load_module(pipeline / "unet", library, name)


def test_wrappers_equal_the_pipeline_parts(pristine: Path) -> None:
    import torch

    from exporters.source.networks import torch_component

    vae, image = load(pristine, "vae"), torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        moments = torch_component(Role.IMAGE_ENCODER, vae)(image)[0]
        assert torch.equal(moments, vae.encode(image).latent_dist.parameters)
        latents = moments[:, :4]
        assert torch.equal(torch_component(Role.IMAGE_DECODER, vae)(latents)[0], vae.decode(latents).sample)
