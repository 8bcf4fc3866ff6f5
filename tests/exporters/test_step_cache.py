"""The U-Net in two graphs: together they are the U-Net, in PyTorch and in ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from exporters.families.declaration import ComponentSpec
from exporters.families.shallow_component import shallow_weights, with_step_cache
from exporters.onnx.optimize_graph import optimize_onnx
from exporters.onnx.trace import export_onnx
from exporters.source.networks import torch_component
from runtimes.bundle.roles import Role
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError
from tests.runtimes.roles import stable_diffusion

KINDS = {
    "attention": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1},
    "convolutions": {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                     "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2},
}


def make(kind: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
                                cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8, **KINDS[kind]).eval()


ROLES = stable_diffusion(4, 8, 0.18215, 64, 64, 7)


def specs_of(model: UNet2DConditionModel) -> dict[str, ComponentSpec]:
    rows, side = ShapeRange(1, 2, 8), ShapeRange(4, 8, 32)
    latent = ("batch", 4, "height", "width")
    unet = ComponentSpec(
        "unet", "unet",
        (TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ("batch",)),
         TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", 16))),
        (TensorSpec("out_sample", "float32", latent),),
        {"batch": Axis("images", rows), "sequence": Axis("tokens", ShapeRange(1, 7, 7)),
         "height": Axis("rows", side, 2), "width": Axis("columns", side, 2)})
    return with_step_cache({"unet": unet}, ROLES, model.config, "unet")[0]


def inputs(batch: int, rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, rows, columns, generator=random), torch.rand(batch, generator=random) * 999,
            torch.randn(batch, 7, 16, generator=random)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shallow_network_with_its_own_deep_feature_is_the_whole_one(kind):
    model, fed = make(kind), inputs(2, 8, 6, 0)
    whole = torch_component(Role.DENOISER, model, ("out_sample", "deep_feature"))
    shallow = torch_component(Role.SHALLOW, model)
    with torch.inference_mode():
        plain = model(*fed).sample
        output, deep = whole(*fed)
        torch.testing.assert_close(output, plain, rtol=0, atol=0)
        torch.testing.assert_close(shallow(*fed, deep)[0], plain, rtol=1e-6, atol=1e-6)
        other = inputs(2, 8, 6, 1)
        assert (shallow(*other, deep)[0] - model(*other).sample).abs().max() > 1e-3
    assert deep.shape[1] == specs_of(model)["unet"].outputs[1].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_listed_weights_are_those_that_the_shallow_network_holds(kind):
    model = make(kind)
    listed = sum(p.numel() for name, p in model.named_parameters() if name.startswith(shallow_weights(model.config)))
    assert listed == sum(p.numel() for p in torch_component(Role.SHALLOW, model).parameters())


def test_both_graphs_equal_pytorch_at_other_sizes_than_traced(tmp_path):
    import onnxruntime as ort

    model, fed = make("attention"), inputs(3, 6, 10, 2)
    specs = specs_of(model)
    modules = {"unet": torch_component(Role.DENOISER, model, ("out_sample", "deep_feature")),
               "unet_shallow": torch_component(Role.SHALLOW, model)}
    with torch.inference_mode():
        output, deep = (t.numpy() for t in modules["unet"](*fed))
    feeds = {s.name: t.numpy() for s, t in zip(specs["unet"].inputs, fed, strict=True)}
    for name, module in modules.items():
        export_onnx(module, specs[name], tmp_path / name)
        optimize_onnx(tmp_path / name / "model.onnx", tmp_path / f"{name}.onnx",
                      Role.DENOISER if name == "unet" else Role.SHALLOW, "onnxruntime")
        session = ort.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, feeds if name == "unet" else {**feeds, "deep_feature": deep})
        for a, b in zip(found, (output, deep), strict=False):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_a_model_without_a_unet_is_refused():
    specs = {"unet": specs_of(make("attention"))["unet"]}
    with pytest.raises(InputError, match="only a U-Net"):
        with_step_cache(specs, ROLES, {}, "here")


@pytest.mark.parametrize(("key", "value"), [
    ("center_input_sample", True), ("time_embedding_act_fn", "gelu"), ("addition_embed_type", "text"),
    ("encoder_hid_dim_type", "text_proj")])
def test_a_unet_that_does_more_before_its_layers_is_refused_by_the_key(key, value):
    model = make("attention")
    model.register_to_config(**{key: value})
    with pytest.raises(InputError, match=f"the step cache does not know {key}={value!r}"):
        specs_of(model)
