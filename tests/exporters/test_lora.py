"""A merged LoRA against diffusers and PEFT themselves, tensor by tensor, in every layout that they load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.adapters.lora_differences import differences
from exporters.adapters.lora_merging import levels_of, matrices_of
from runtimes.adapters.lora_files import read_factors
from runtimes.errors import InputError
from tests.exporters.family_pipelines import make_pipeline
from tests.exporters.lora_files import (
    NETWORKS,
    PLACES,
    Tensors,
    dotted,
    fused_by_diffusers,
    kohya,
    merged_by_us,
    pairs,
    stated,
    weights_of,
    write,
)

pytestmark = [pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # two adapters, as meant
              pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning"),
              pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning"),
              pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
              pytest.mark.filterwarnings("ignore:Adapter cannot be set to trainable:UserWarning")]
TO_Q, TO_OUT, FF, PROJ_IN, CONV = PLACES["unet"]
Q_PROJ = PLACES["text_encoder"][0]
LINEAR_LAYER = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
LORA_DOWN = ".lora.down.weight", ".lora.up.weight"
OLD = "_lora.down.weight", "_lora.up.weight"

# The original U-Net's names, two levels of one layer each -> diffusers'
ORIGINAL = {
    "input_blocks_1_1_transformer_blocks_0_attn1_to_q": TO_Q,
    "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks_1_1_transformer_blocks_0_attn2_to_out_0": TO_OUT,
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block_1_transformer_blocks_0_ff_net_2": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "output_blocks_3_1_proj_out": "up_blocks.1.attentions.1.proj_out",
    "input_blocks_1_0_in_layers_2": CONV, "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_1_0_out_layers_3": "down_blocks.0.resnets.0.conv2",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
}
ENDS = {"time_embed_0": "time_embedding.linear_1", "time_embed_2": "time_embedding.linear_2",
        "input_blocks_0_0": "conv_in", "out_2": "conv_out"}
LABELS = {"label_emb_0_0": "add_embedding.linear_1", "label_emb_0_2": "add_embedding.linear_2"}
UPSAMPLER = {"output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv"}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {"sd": make_pipeline("sd2"), "xl": make_pipeline("xl")}


def renamed(pipe: Any, names: Mapping[str, str], *alphas: Any) -> Tensors:
    """kohya's keys of another numbering."""
    found = pairs(pipe, "unet", tuple(names.values()))
    return kohya("lora_unet_", {name: found[place] for name, place in names.items()}, *alphas)


def text_model(tensors: Tensors) -> Tensors:
    return {key.replace("encoder_layers", "text_model_encoder_layers"): tensor for key, tensor in tensors.items()}


def worst(found: Tensors, expected: Tensors, plain: Tensors) -> float:
    """The largest relative error of what a weight changed by; something must have changed."""
    assert found.keys() == expected.keys()
    changed = {key for key in plain
               if not (torch.equal(expected[key], plain[key]) and torch.equal(found[key], plain[key]))}
    assert changed, "nothing changed"
    return max(float((found[key] - expected[key]).norm() / (expected[key] - plain[key]).norm().clamp_min(1e-9))
               for key in changed)


Layout = Callable[[Any], tuple[Tensors, Any]]
LAYOUTS: dict[str, Layout] = {
    "peft": lambda p: (dotted("unet", pairs(p, "unet")), None),
    "peft, ranks differ": lambda p: (dotted("unet", pairs(p, "unet", ranks=(2, 3, 5))), None),
    "peft, both parts": lambda p: (dotted("unet", pairs(p, "unet")) | dotted("text_encoder", pairs(p, "text_encoder")),
                                   None),
    "peft, text_model.": lambda p: (dotted("text_encoder", pairs(p, "text_encoder", ranks=(2, 3, 4)), "text_model."),
                                    None),
    "peft, key order turned": lambda p: (dict(reversed(dotted("unet", pairs(p, "unet", ranks=(2, 3))).items())), None),
    "float16": lambda p: ({k: v.half() for k, v in dotted("unet", pairs(p, "unet")).items()}, None),
    "bfloat16": lambda p: ({k: v.bfloat16() for k, v in dotted("unet", pairs(p, "unet")).items()}, None),
    "float64": lambda p: ({k: v.double() for k, v in dotted("unet", pairs(p, "unet")).items()}, None),
    "diffusers 0.17": lambda p: (dotted("unet", pairs(p, "unet"), "", *LORA_DOWN)
                                 | dotted("text_encoder", pairs(p, "text_encoder"), "text_model.", *LINEAR_LAYER),
                                 None),
    "diffusers 0.12": lambda p: (dotted("unet", pairs(p, "unet", (TO_Q, TO_OUT)), "", *OLD, name=lambda place: (
        place.replace(".to_", ".processor.to_").removesuffix(".0"))), None),
    "diffusers 0.15, text encoder": lambda p: (dotted(
        "text_encoder", pairs(p, "text_encoder", PLACES["text_encoder"][:2]), "text_model.", *OLD,
        name=lambda place: place.replace("q_proj", "to_q").replace("out_proj", "to_out")), None),
    "kohya without alphas": lambda p: (kohya("lora_unet_", pairs(p, "unet", ranks=(2, 3))), None),
    "kohya, one alpha": lambda p: (kohya("lora_unet_", pairs(p, "unet"), 1.0)
                                   | text_model(kohya("lora_te_", pairs(p, "text_encoder"), 1.5)), None),
    "kohya, te1": lambda p: (text_model(kohya("lora_te1_", pairs(p, "text_encoder"), 1.5)), None),
    "kohya, alpha 0": lambda p: (kohya("lora_unet_", pairs(p, "unet", (CONV, FF)), 0.0, 2.0), None),
    "kohya, alphas of layers that are no projections": lambda p: (
        kohya("lora_unet_", pairs(p, "unet", (FF, PROJ_IN, CONV), ranks=(2, 4)), 1.0, 2.0, -3.0), None),
    "the original U-Net's ends": lambda p: (renamed(p, ENDS, 2.0), None),
    "kohya, diffusers' ends": lambda p: (kohya("lora_unet_", pairs(p, "unet", tuple(ENDS.values())), 1.0), None),
    "config": lambda p: (dotted("unet", pairs(p, "unet")), stated("unet", lora_alpha=5)),
    "config without alpha": lambda p: (dotted("unet", pairs(p, "unet")), 
                                       {k: v for k, v in stated("unet").items() if "alpha" not in k}),
    "config without rank": lambda p: (dotted("unet", pairs(p, "unet", ranks=(8,))), 
                                      {k: v for k, v in stated("unet", lora_alpha=3).items() if k != "unet.r"}),
    "config, rank-stabilised": lambda p: (dotted("unet", pairs(p, "unet")),
                                          stated("unet", lora_alpha=5, use_rslora=True)),
    "config, patterns": lambda p: (dotted("unet", pairs(p, "unet", ranks=(2, 4))), stated(
        "unet", lora_alpha=5, rank_pattern={"attn2.to_out.0": 4, r"mid_block\.attentions\.\d\.proj_in": 4},
        alpha_pattern={"^mid_block.*": 3, "to_q": 7, ".*conv1": 0.5})),
    "config, what changes nothing": lambda p: (dotted("unet", pairs(p, "unet")), stated(
        "unet", fan_in_fan_out=True, bias="all", lora_dropout=0.3, init_lora_weights="gaussian", use_dora=False,
        modules_to_save=None, peft_type="LORA")),
    "config of the text encoder": lambda p: (
        dotted("text_encoder", pairs(p, "text_encoder")),
        stated("text_encoder", alpha_pattern={"fc1": 9, r"layers\.\d+\.self_attn\.(q|k)_proj": 1})),
}


@pytest.mark.parametrize(("family", "layout"), [("sd", layout) for layout in LAYOUTS] + [
    ("xl", layout) for layout in LAYOUTS if layout in ("peft, both parts", "kohya, one alpha", "config, patterns")])
def test_merged_weights_are_those_that_diffusers_fuses(
    pipes: dict[str, Any], family: str, layout: str, tmp_path: Path
) -> None:
    pipe = pipes[family]
    file = write(tmp_path / "lora.safetensors", *LAYOUTS[layout](pipe))
    assert worst(merged_by_us(pipe, {file: 0.7}), fused_by_diffusers(pipe, {file: 0.7}), weights_of(pipe)) <= 2e-6
    assert differences(file) == ()


@pytest.mark.parametrize(("dtype", "shape"), [
    (torch.float32, (1,)), (torch.float16, ()), (torch.bfloat16, (1, 1)), (torch.float64, ()), (torch.int64, ()),
    (torch.uint8, (1,)), (torch.bool, ()), (torch.float8_e4m3fn, ()), (torch.float8_e5m2, (1,))])
def test_an_alpha_of_any_type_and_shape_is_its_number(
    pipes: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = write(tmp_path / "lora.safetensors", kohya("lora_unet_", pairs(pipes["sd"], "unet"),
                                                      torch.full(shape, 3.0).to(dtype)))
    assert worst(merged_by_us(pipes["sd"], {file: 1.0}), fused_by_diffusers(pipes["sd"], {file: 1.0}),
                 weights_of(pipes["sd"])) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_matrices_of_eight_bits_are_read_as_pytorch_reads_them(
    pipes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe, found = pipes["sd"], dotted("unet", pairs(pipes["sd"], "unet"))
    small = write(tmp_path / "small.safetensors", {key: matrix.to(dtype) for key, matrix in found.items()})
    wide = write(tmp_path / "wide.safetensors", {key: matrix.to(dtype).float() for key, matrix in found.items()})
    assert worst(merged_by_us(pipe, {small: 1.0}), fused_by_diffusers(pipe, {wide: 1.0}), weights_of(pipe)) <= 2e-6


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.8, -0.3), (0.0, 2.5)])
def test_several_files_add_up_with_their_scales(
    pipes: dict[str, Any], scales: tuple[float, float], tmp_path: Path
) -> None:
    pipe = pipes["xl"]
    one = write(tmp_path / "one.safetensors", dotted("unet", pairs(pipe, "unet"))
                | dotted("text_encoder_2", pairs(pipe, "text_encoder_2", ranks=(3,)), "text_model."))
    two = write(tmp_path / "two.safetensors", kohya("lora_unet_", pairs(pipe, "unet", seed=7, ranks=(4,)), 1.0)
                | text_model(kohya("lora_te2_", pairs(pipe, "text_encoder_2", seed=8), 0.5)))
    loras = dict(zip((one, two), scales, strict=True))
    assert worst(merged_by_us(pipe, loras), fused_by_diffusers(pipe, loras), weights_of(pipe)) <= 2e-6


def test_the_projection_of_the_second_text_encoder_has_a_place(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["xl"]
    file = write(tmp_path / "lora.safetensors", dotted("text_encoder_2", pairs(pipe, "text_encoder_2"), "text_model.")
                 | dotted("text_encoder_2", pairs(pipe, "text_encoder_2", ("text_projection",))))
    assert worst(merged_by_us(pipe, {file: 1.0}), fused_by_diffusers(pipe, {file: 1.0}), weights_of(pipe)) <= 2e-6


def test_the_original_u_nets_numbering_of_xl(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["xl"]
    file = write(tmp_path / "lora.safetensors", renamed(pipe, ORIGINAL | ENDS | LABELS, 1.0))
    assert worst(merged_by_us(pipe, {file: 1.0}), fused_by_diffusers(pipe, {file: 1.0}), weights_of(pipe)) <= 2e-6
    assert differences(file) == ()


# ---- what diffusers reads otherwise or not at all: ours is what the file says. docs/families.md lists each.

def by_formula(pipe: Any, names: Mapping[str, str], tensors: Tensors, prefix: str, component: str) -> Tensors:
    """W + alpha / rank * up @ down; names in the file -> modules."""
    weights = weights_of(pipe)
    for name, place in names.items():
        down, up = (tensors[f"{prefix}{name}.lora_{side}.weight"] for side in ("down", "up"))
        key = next(k for k in weights if k in (f"{component}.{place}.weight", f"{component}.text_model.{place}.weight"))
        alpha = float(tensors.get(f"{prefix}{name}.alpha", torch.tensor(float(len(down)))))
        delta = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        weights[key] = weights[key] + delta.reshape(weights[key].shape)
    return weights


def plain_names(component: str) -> dict[str, str]:
    inner = "" if component == "unet" else "text_model."
    return {f"{inner}{place}".replace(".", "_"): place for place in PLACES[component]}


@pytest.mark.parametrize("alphas", [(1.0, 2.0, 4.0), (3.0, None)])
@pytest.mark.parametrize(("family", "component", "prefix"), [("sd", "unet", "lora_unet_"),
                                                             ("sd", "text_encoder", "lora_te_"),
                                                             ("xl", "text_encoder_2", "lora_te2_")])
def test_each_module_has_its_own_alpha_where_diffusers_takes_the_most_common(
    pipes: dict[str, Any], alphas: tuple[Any, ...], family: str, component: str, prefix: str, tmp_path: Path
) -> None:
    """`get_peft_kwargs` (utils/peft_utils.py:179-189) makes patterns of names that no module has: `to_q_lora.down`."""
    pipe = pipes[family]
    tensors = kohya(prefix, pairs(pipe, component), *alphas)
    tensors = tensors if component == "unet" else text_model(tensors)
    file = write(tmp_path / "lora.safetensors", tensors)
    ours, plain = merged_by_us(pipe, {file: 1.0}), weights_of(pipe)
    assert worst(ours, by_formula(pipe, plain_names(component), tensors, prefix, component), plain) <= 2e-6
    assert differences(file) == ("alphas",)
    assert worst(ours, fused_by_diffusers(pipe, {file: 1.0}), plain) > 0.1, "mended upstream: no longer a difference"


def test_mixed_numberings_are_merged_where_diffusers_drops_one(pipes: dict[str, Any], tmp_path: Path) -> None:
    """`_maybe_map_sgm_blocks_to_diffusers` (loaders/lora_conversion_utils.py:48-52) pops the original's keys."""
    pipe = pipes["xl"]
    names = {"down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
             "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in"}
    tensors = renamed(pipe, names, 1.0)
    file, plain = write(tmp_path / "lora.safetensors", tensors), weights_of(pipe)
    ours = merged_by_us(pipe, {file: 1.0})
    assert worst(ours, by_formula(pipe, names, tensors, "lora_unet_", "unet"), plain) <= 2e-6
    assert differences(file) == ("numbering",)
    theirs = fused_by_diffusers(pipe, {file: 1.0})["unet.down_blocks.0.attentions.0.proj_in.weight"]
    assert torch.equal(theirs, plain["unet.down_blocks.0.attentions.0.proj_in.weight"])


def test_an_adapters_name_in_the_keys_is_passed_over(pipes: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's own state dict has it; diffusers warns of unexpected keys and loads nothing."""
    pipe, found = pipes["sd"], pairs(pipes["sd"], "unet")
    file = write(tmp_path / "lora.safetensors", dotted("unet", found, "", ".lora_A.default.weight",
                                                       ".lora_B.default.weight"))
    same = write(tmp_path / "same.safetensors", dotted("unet", found))
    assert worst(merged_by_us(pipe, {file: 1.0}), merged_by_us(pipe, {same: 1.0}), weights_of(pipe)) == 0
    assert differences(file) == ("adapter-name",)
    theirs, plain = fused_by_diffusers(pipe, {file: 1.0}), weights_of(pipe)
    assert all(torch.equal(theirs[key], plain[key]) for key in plain)


def test_patterns_that_name_text_model_fit_where_transformers_5_has_no_such_name(
    pipes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes["sd"]
    tensors = dotted("text_encoder", pairs(pipe, "text_encoder"), "text_model.")
    one, same = (write(tmp_path / f"{i}.safetensors", tensors, stated("text_encoder", alpha_pattern={key: 9}))
                 for i, key in enumerate((f"text_model.{Q_PROJ}", Q_PROJ)))
    assert worst(merged_by_us(pipe, {one: 1.0}), fused_by_diffusers(pipe, {same: 1.0}), weights_of(pipe)) <= 2e-6
    theirs = fused_by_diffusers(pipe, {one: 1.0})
    assert worst(merged_by_us(pipe, {one: 1.0}), theirs, weights_of(pipe)) > 0.1, "mended upstream"


OUT_PROJ = Q_PROJ.replace("q_proj", "out_proj")


@pytest.mark.parametrize("config", [
    {"target_modules": [Q_PROJ]}, {"target_modules": r".*q_proj"}, {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "out_proj"], "exclude_modules": ["out_proj"]}])
def test_a_text_encoders_module_that_the_metadata_leaves_out_is_refused_as_diffusers_leaves_it_out(
    pipes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes["sd"]
    both = dotted("text_encoder", pairs(pipe, "text_encoder", (Q_PROJ, OUT_PROJ)), "text_model.")
    file = write(tmp_path / "lora.safetensors", both, stated("text_encoder", **config))
    theirs, plain = fused_by_diffusers(pipe, {file: 1.0}), weights_of(pipe)
    assert {key.rsplit(".", 2)[1] for key in plain if not torch.equal(theirs[key], plain[key])} == {"q_proj"}
    with pytest.raises(InputError, match=r"out_proj.* is of a module that the metadata leaves out"):
        merged_by_us(pipe, {file: 1.0})


@pytest.mark.parametrize("config", [
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj", OUT_PROJ]}, {"target_modules": r".*(q|out)_proj"},
    {"target_modules": ["q_proj", "out_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj", "out_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "out_proj"], "exclude_modules": ["fc1"]}])
def test_a_text_encoders_modules_that_the_metadata_names_by_any_rule_of_peft_are_merged(
    pipes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes["sd"]
    both = dotted("text_encoder", pairs(pipe, "text_encoder", (Q_PROJ, OUT_PROJ)), "text_model.")
    file = write(tmp_path / "lora.safetensors", both, stated("text_encoder", **config))
    expected = fused_by_diffusers(pipe, {file: 1.0})
    assert worst(merged_by_us(pipe, {file: 1.0}), expected, weights_of(pipe)) <= 2e-6


def test_a_unet_has_what_the_tensors_say_whatever_its_target_modules_say(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["sd"]
    file = write(tmp_path / "lora.safetensors", dotted("unet", pairs(pipe, "unet", (TO_Q, TO_OUT))),
                 stated("unet", target_modules=[TO_Q]))
    expected = fused_by_diffusers(pipe, {file: 1.0})
    assert worst(merged_by_us(pipe, {file: 1.0}), expected, weights_of(pipe)) <= 2e-6


def test_files_that_diffusers_fails_on_are_read(pipes: dict[str, Any], tmp_path: Path) -> None:
    """Alphas in PEFT's format; kohya's text encoder without the projection by which diffusers knows the format."""
    pipe, found = pipes["sd"], pairs(pipes["sd"], "unet", (TO_Q,))
    text = pairs(pipe, "text_encoder", (Q_PROJ,))
    half = {f"unet.{TO_Q}.alpha": torch.tensor(1.0)}
    for tensors, same, scale in ((dotted("unet", found) | half, dotted("unet", found), 0.5),
                                 (text_model(kohya("lora_te_", text, 1.0)), dotted("text_encoder", text), 0.5)):
        file, plain = write(tmp_path / "a.safetensors", tensors), write(tmp_path / "b.safetensors", same)
        with pytest.raises(ValueError, match=r"Invalid LoRA checkpoint|Could not automatically infer"):
            fused_by_diffusers(pipe, {file: 1.0})
        expected = fused_by_diffusers(pipe, {plain: scale})
        assert worst(merged_by_us(pipe, {file: 1.0}), expected, weights_of(pipe)) <= 2e-6


@pytest.mark.parametrize("extra", [
    {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 2)},
    {f"unet.{TO_OUT}.lora_A.weight": torch.ones(2, 16)},
    {f"unet.{TO_Q}.lora.down.weight": torch.ones(2, 16), f"unet.{TO_Q}.lora.up.weight": torch.ones(16, 2)},
    {"vae.encoder.lora_A.weight": torch.ones(2, 2)}])
def test_what_diffusers_passes_over_is_refused(pipes: dict[str, Any], extra: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", dotted("unet", pairs(pipes["sd"], "unet", (TO_Q,))) | extra)
    fused_by_diffusers(pipes["sd"], {file: 1.0})
    with pytest.raises(InputError):
        merged_by_us(pipes["sd"], {file: 1.0})


@pytest.mark.parametrize("names", [ORIGINAL | UPSAMPLER, {"add_embedding_linear_1": "add_embedding.linear_1"}])
def test_names_that_diffusers_fails_on_are_read(pipes: dict[str, Any], names: dict[str, str], tmp_path: Path) -> None:
    """Stable Diffusion 1 and 2 in the original's numbering, its upsampler, XL's labels by diffusers' name."""
    pipe = pipes["xl" if "add_embedding_linear_1" in names else "sd"]
    tensors = renamed(pipe, names, 1.0)
    file = write(tmp_path / "lora.safetensors", tensors)
    assert worst(merged_by_us(pipe, {file: 1.0}), by_formula(pipe, names, tensors, "lora_unet_", "unet"),
                 weights_of(pipe)) <= 2e-6
    with pytest.raises(Exception, match="not found in the base model"):
        fused_by_diffusers(pipe, {file: 1.0})


def test_what_diffusers_says_differs_is_described() -> None:
    from exporters.adapters.lora_differences import DIFFERENCES

    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in DIFFERENCES)


# ---- merged and given at run time are the same

@pytest.mark.parametrize("layout", ["peft, both parts", "kohya, one alpha", "config, patterns", "float16"])
def test_the_inputs_of_a_swappable_graph_are_what_would_be_merged(
    pipes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    pipe, scale = pipes["sd"], -0.4
    tensors, metadata = LAYOUTS[layout](pipe)
    file = write(tmp_path / "lora.safetensors", tensors, metadata)
    plain, merged = weights_of(pipe), merged_by_us(pipe, {file: scale})
    for component in NETWORKS[:2]:
        network = getattr(pipe, component)
        shapes = matrices_of(network)
        for module, found in read_factors(file, component, scale, shapes, levels_of(network)).items():
            key = f"{component}.{module}.weight"
            np.testing.assert_array_equal(plain[key].numpy() + found.delta(shapes[module], "here"), merged[key].numpy())


def test_a_table_of_embeddings_is_no_place_for_a_lora(pipes: dict[str, Any], tmp_path: Path) -> None:
    table = pipes["sd"].text_encoder.get_input_embeddings().weight
    key = "text_encoder.embeddings.token_embedding"
    file = write(tmp_path / "lora.safetensors", {f"{key}.lora_A.weight": torch.ones(2, table.shape[1]),
                                                 f"{key}.lora_B.weight": torch.ones(table.shape[0], 2)})
    with pytest.raises(InputError, match=r"token_embedding\.lora_A\.weight fits nothing in the text_encoder"):
        merged_by_us(pipes["sd"], {file: 1.0})


def test_metadata_that_diffusers_cannot_read_is_refused(pipes: dict[str, Any], tmp_path: Path) -> None:
    for key, value, words in (("r", 4, "is of rank 2, its metadata says 4"),
                              ("use_dora", True, "unet.use_dora is true"),
                              ("init_lora_weights", "pissa", "unet.init_lora_weights"), ("foo", 1, "unet.foo is 1"),
                              ("alpha_pattern", {"*": 3}, "no regular expression")):
        file = write(tmp_path / f"{key}.safetensors", dotted("unet", pairs(pipes["sd"], "unet")),
                     stated("unet", **{key: value}))
        with pytest.raises(InputError, match=words):
            merged_by_us(pipes["sd"], {file: 1.0})
        with pytest.raises(Exception, match=r".+"):
            fused_by_diffusers(pipes["sd"], {file: 1.0})
