"""Reading LoRA files: names, PEFT's patterns, and every refusal. What is merged: `tests/exporters/test_lora.py`."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import save_file

from runtimes.adapters.lora_config import LoraConfig, read_config
from runtimes.adapters.lora_files import networks_of, read_factors
from runtimes.adapters.lora_module_names import from_original, name_of, spellings
from runtimes.bundle.safetensors_reader import read_floats, read_header, read_number
from runtimes.errors import InputError

A, B = "unet.mid.lin.lora_A.weight", "unet.mid.lin.lora_B.weight"
MODULES = {"mid.lin": (6, 4), "conv_in": (6, 4, 3, 3), "down_blocks.0.attentions.0.to_q": (4, 4)}
PAIR = {A: np.ones((2, 4), np.float32), B: np.ones((6, 2), np.float32)}


def lora(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    file = folder / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)} if config else None)
    return file


def read(file: Path, component: str = "unet") -> dict[str, Any]:
    return read_factors(file, component, 1.0, MODULES, 2)


def shaped(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(("extra", "words"), [
    ({"unet.mid.lin.lora_magnitude_vector": shaped(6)}, r"lora_magnitude_vector .* it is DoRA"),
    ({"lora_unet_mid_lin.dora_scale": shaped(6)}, r"dora_scale .* it is DoRA"),
    ({"lora_unet_conv_in.lora_mid.weight": shaped(2, 2, 3, 3)}, "it is LoCon's CP decomposition"),
    ({"lora_unet_conv_in.hada_w1_a": shaped(2, 2)}, "it is LoHa"),
    ({"lora_unet_conv_in.lokr_w1": shaped(2, 2)}, "it is LoKr"),
    ({"lora_unet_conv_in.oft_blocks": shaped(2, 2)}, "it is OFT"),
    ({"lora_unet_conv_in.diff": shaped(2, 2)}, "a difference of whole weights"),
    ({"lora_unet_conv_in.diff_b": shaped(2)}, "a difference of whole weights"),
    ({"unet.mid.lin.lora_B.bias": shaped(6)}, "a change of biases"),
    ({"lora_unet_norm.w_norm": shaped(6)}, "a change of norms"),
    ({"text_encoder.embeddings.token_embedding.lora_embedding_A": shaped(2, 4)}, "the table of embeddings"),
    ({"bundle_emb.cat.string_to_param.*": shaped(2, 4)}, "an embedding"),
    ({"mid.lin.lora_A.weight": shaped(2, 4)}, "names no component"),
    ({"base_model.model.mid.lin.lora_A.weight": shaped(2, 4)}, "names no component"),
    ({"vae.mid.lin.lora_A.weight": shaped(2, 4)}, "names no component"),
    ({"transformer.mid.lora_A.weight": shaped(2, 4)}, "names no component"),
    ({"unet.mid.lin.something": shaped(2)}, "unet.mid.lin.something is not a key of a LoRA"),
    ({"unet.nowhere.lora_A.weight": shaped(2, 4), "unet.nowhere.lora_B.weight": shaped(6, 2)},
     "unet.nowhere.lora_A.weight fits nothing in the unet"),
    ({"unet.conv_in.alpha": shaped(1)}, "unet.conv_in.alpha has no weights beside it"),
    ({"unet.conv_in.lora_A.weight": shaped(2, 4, 3, 3)}, "unet.conv_in.lora_A.weight lacks its other half"),
    ({"unet.conv_in.lora_B.weight": shaped(6, 2, 1, 1), "unet.conv_in.alpha": shaped(1)},
     "unet.conv_in.lora_B.weight lacks its other half"),
    ({"lora_unet_mid_lin.lora_down.weight": shaped(2, 4), "lora_unet_mid_lin.lora_up.weight": shaped(6, 2)},
     r"lora_unet_mid_lin.lora_down.weight and unet.mid.lin.lora_A.weight both change mid.lin"),
    ({"unet.mid.lin.lora.down.weight": shaped(2, 4)},
     r"unet\.mid\.lin\.lora\.down\.weight and unet\.mid\.lin\.lora_A\.weight both change mid\.lin"),
    ({"unet.mid.lin.alpha": shaped(1), "lora_unet_mid_lin.alpha": shaped(1)}, "alpha and .*alpha both change mid.lin"),
    ({"unet.mid.lin.alpha": shaped(2)}, r"unet.mid.lin.alpha has the shape \(2,\), expected one number"),
    ({"unet.mid.lin.alpha": shaped(0)}, r"unet.mid.lin.alpha has the shape \(0,\), expected one number"),
    ({"unet.mid.lin.alpha": np.array(np.nan, np.float32)}, "unet.mid.lin.alpha is nan"),
    ({"unet.mid.lin.alpha": np.array(np.inf, np.float32)}, "unet.mid.lin.alpha is inf"),
])
def test_a_key_without_a_place_is_refused_by_name_and_kind(
    extra: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    file = lora(tmp_path, PAIR | extra)
    with pytest.raises(InputError, match=words):
        for component in networks_of(file):
            read(file, component)


@pytest.mark.parametrize(("down", "up", "words"), [
    (shaped(2, 5), shaped(6, 2), "does not fit"), (shaped(2, 4), shaped(5, 2), "does not fit"),
    (shaped(3, 4), shaped(6, 2), "does not fit"), (shaped(2, 2, 2), shaped(6, 2), "does not fit"),
    (shaped(4), shaped(6, 1), "not matrices"), (shaped(0, 4), shaped(6, 0), "not matrices"),
    (shaped(2, 4) * np.nan, shaped(6, 2), "NaN or infinity"), (shaped(2, 4), shaped(6, 2) * np.inf, "NaN or infinity"),
])
def test_matrices_that_fit_nothing_are_refused(down: np.ndarray, up: np.ndarray, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words), np.errstate(invalid="ignore"):
        for name, found in read(lora(tmp_path, {A: down, B: up})).items():
            found.delta(MODULES[name], "here")


def test_a_convolution_of_one_pixel_is_a_matrix(tmp_path: Path) -> None:
    found = read(lora(tmp_path, {A: shaped(2, 4, 1, 1), B: shaped(6, 2, 1, 1)}))["mid.lin"]
    assert np.array_equal(found.delta((6, 4), "here"), np.full((6, 4), 2))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint64,
                                   np.uint32, np.uint16, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_number_of_any_type_is_read(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({"before": shaped(3), "n": np.full(shape, 1, dtype)}, tmp_path / "n.safetensors")
    header = read_header(tmp_path / "n.safetensors")
    assert read_number(tmp_path / "n.safetensors", header, "n") == 1


def test_all_values_of_eight_bits_are_pytorchs(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save

    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        file = tmp_path / "f.safetensors"
        save({"x": every.view(dtype).reshape(2, 128)}, file)
        np.testing.assert_array_equal(read_floats(file, read_header(file), "x"),
                                      every.view(dtype).float().reshape(2, 128).numpy())


PATTERNS = st.lists(st.sampled_from([
    "mid.lin", "lin", "^mid", "mid.*", r"mid\.lin", "^mid.lin$", ".*", "conv_(in|out)", r"down_blocks\.\d+\..*to_(q|k)",
    "to_q", "attentions.0.to_q", "o_q", "nothing", r".*\.to_q", "(mid|down_blocks).*"]), unique=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ranks=PATTERNS, alphas=PATTERNS, rank=st.integers(1, 64), alpha=st.floats(-8, 8), stabilised=st.booleans())
def test_patterns_are_matched_by_pefts_own_rule(
    ranks: list[str], alphas: list[str], rank: int, alpha: float, stabilised: bool
) -> None:
    """As `peft.tuners.lora.LoraModel._create_and_replace` asks for them."""
    patterns = {key: i + 2 for i, key in enumerate(ranks)}, {key: i + 0.5 for i, key in enumerate(alphas)}
    config = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.use_rslora": stabilised,
              "unet.rank_pattern": patterns[0], "unet.alpha_pattern": patterns[1]}
    found = read_config({"lora_adapter_metadata": json.dumps(config)}, "unet", Path("f"))
    for module in MODULES:
        own = patterns[0].get(get_pattern_key(patterns[0].keys(), module), rank)
        assert found.rank_of(module) == own
        expected = patterns[1].get(get_pattern_key(patterns[1].keys(), module), alpha)
        assert found.scale_of(module) == pytest.approx(expected / (own**0.5 if stabilised else own))


def test_a_pattern_that_fits_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT warns too, and goes on."""
    file = lora(tmp_path, PAIR, **{"unet.r": 2, "unet.lora_alpha": 2,
                                   "unet.alpha_pattern": {"nowhere": 9, "mid.lin": 4}, "unet.rank_pattern": {"lin": 2}})
    assert read(file)["mid.lin"].up[0, 0] == 2
    assert [re.findall(r"'(\w+)' of (\w+)", record.message) for record in caplog.records] == [
        [("nowhere", "alpha_pattern")]]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(("config", "words"), [
    ({"unet.use_dora": True}, "unet.use_dora is true"), ({"unet.lora_bias": True}, "unet.lora_bias is true"),
    ({"unet.init_lora_weights": "pissa_niter_4"}, "unet.init_lora_weights is"), ({"unet.r": "8"}, "r is '8'"),
    ({"unet.modules_to_save": ["x"]}, "unet.modules_to_save is"), ({"unet.rank_pattern": [1]}, "rank_pattern is list"),
    ({"unet.layer_replication": [[0, 1]]}, "unet.layer_replication is"), ({"unet.r": 0}, "not positive"),
    ({"unet.alpha_pattern": {"(": 1}}, "no regular expression"), ({"unet.r": True}, "r is True"),
    ({"unet.alpha_pattern": {"lin": None}}, "lin is None"), ({"unet.lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"unet.r": 4}, "is of rank 2, its metadata says 4"), ({"unet.rank_pattern": {"lin": 3}, "unet.r": 2}, "says 3"),
    ({"unet.use_bdlora": {"a": 1}}, "unet.use_bdlora is"), ({"unet.unheard_of": 1}, "unet.unheard_of is 1"),
])
def test_a_config_that_is_not_honoured_is_refused_by_its_key(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        read(lora(tmp_path, PAIR, **config))


@pytest.mark.parametrize("text", ["{broken", "[1]", "3"])
def test_metadata_that_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a JSON object"):
        read_config({"lora_adapter_metadata": text}, "unet", Path("f"))


def test_without_a_config_of_its_own_a_component_has_scale_one(tmp_path: Path) -> None:
    for metadata in ({}, {"lora_adapter_metadata": ""}, {"lora_adapter_metadata": '{"text_encoder.r": 4}'}):
        assert read_config(metadata, "unet", tmp_path) == LoraConfig()
    assert read(lora(tmp_path, PAIR, **{"text_encoder.r": 4}))["mid.lin"].up[0, 0] == 1


def test_an_alpha_that_the_metadata_states_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unet\.mid\.lin\.alpha is stated a second time"):
        read(lora(tmp_path, PAIR | {"unet.mid.lin.alpha": shaped(1)}, **{"unet.r": 2}))


@pytest.mark.parametrize(("place", "levels", "expected"), [
    ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 2,
     "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
    ("input_blocks_8_1_proj_in", 2, "down_blocks_2_attentions_1_proj_in"),
    ("middle_block_1_transformer_blocks_9_ff_net_2", 2, "mid_block_attentions_0_transformer_blocks_9_ff_net_2"),
    ("output_blocks_0_1_proj_out", 2, "up_blocks_0_attentions_0_proj_out"), ("input_blocks_3_0_op", 2,
                                                                             "down_blocks_0_downsamplers_0_conv"),
    ("output_blocks_2_2_conv", 2, "up_blocks_0_upsamplers_0_conv"), ("middle_block_2_out_layers_3", 2,
                                                                     "mid_block_resnets_1_conv2"),
    ("input_blocks_1_0_in_layers_2", [1, 2, 3], "down_blocks_0_resnets_0_conv1"),
    ("input_blocks_2_0_op", [1, 2, 3], "down_blocks_0_downsamplers_0_conv"),
    ("input_blocks_5_0_op", [1, 2, 3], "down_blocks_1_downsamplers_0_conv"),
    ("input_blocks_8_1_proj_in", [1, 2, 3], "down_blocks_2_attentions_2_proj_in"),
    ("output_blocks_3_1_conv", [1, 2, 3], "up_blocks_0_upsamplers_0_conv"),
    ("output_blocks_4_1_proj_in", [1, 2, 3], "up_blocks_1_attentions_0_proj_in"),
    ("output_blocks_8_0_skip_connection", (1, 2, 3), "up_blocks_2_resnets_1_conv_shortcut"),
])
def test_the_original_u_nets_numbering_is_counted_through(place: str, levels: Any, expected: str) -> None:
    assert from_original(place, levels) == expected


@pytest.mark.parametrize("place", ["encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj",
                                   "text_model_encoder_layers_0_self_attn_q_proj", "encoder_layers_0_self_attn_q_proj",
                                   "text_model.encoder.layers.0.self_attn.to_q"])
@pytest.mark.parametrize("inner", ["", "text_model."])
def test_a_text_encoders_module_is_found_under_every_spelling(place: str, inner: str) -> None:
    module = f"{inner}encoder.layers.0.self_attn.q_proj"
    assert name_of(place, spellings([module]), 2) == module
