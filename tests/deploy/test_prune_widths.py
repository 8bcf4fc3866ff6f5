"""Which shapes a network can be pruned to; no torch-pruning needed."""

from __future__ import annotations

import math

import pytest

from deploy.pruning.shrink.width_sensitivity import scan, sensitive_widths
from deploy.pruning.shrink.widths import levels_of, make_widths, pruned_config, uniform_widths
from runtimes.errors import InputError

SD15 = {"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8,
        "num_attention_heads": None, "norm_num_groups": 32}
SD2 = {**SD15, "attention_head_dim": [5, 10, 20, 20]}
REFERENCE = {**SD15, "block_out_channels": [64, 128, 192], "attention_head_dim": [1, 2, 3], "norm_num_groups": 16}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}


@pytest.mark.parametrize("config", [SD15, SD2, REFERENCE, VAE])
@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
def test_levels_shrink_by_whole_norm_groups_and_heads_never_grow(config, ratio):
    levels = levels_of(config, "unet")
    widths = uniform_widths(levels, ratio, "unet")
    assert abs(widths.removed - ratio) <= 0.03
    for level, remaining, heads in zip(levels, widths.remaining, widths.heads, strict=True):
        assert remaining % config["norm_num_groups"] == 0 and remaining % heads == 0
        assert 1 <= heads <= level.heads and remaining // heads <= level.width // level.heads
    equal = [(a.width == b.width) == (x == y) for a, b, x, y in zip(
        levels, levels[1:], widths.remaining, widths.remaining[1:], strict=False)]
    assert all(equal), "a shortcut has its convolution if and only if it had it before"
    new = pruned_config(config, widths)
    assert new["block_out_channels"] == list(widths.remaining)
    assert levels_of(new, "unet")[0].width == widths.remaining[0]


def test_heads_that_no_longer_divide_a_level_are_removed_whole():
    widths = uniform_widths(levels_of(REFERENCE, "unet"), 0.3, "unet")
    assert widths.remaining == (48, 96, 128) and widths.heads == (1, 2, 2)


@pytest.mark.parametrize("config", [SD15, REFERENCE, VAE])
def test_a_ratio_that_leaves_too_little_names_the_level_and_the_nearest_that_works(config):
    levels = levels_of(config, "unet")
    with pytest.raises(InputError, match=r"0\.99 of the \d+ channels of level 0 leaves fewer than the \d+") as caught:
        uniform_widths(levels, 0.99, "unet")
    works = float(caught.value.fix.split()[1])
    assert all(uniform_widths(levels, works, "unet").remaining)
    with pytest.raises(InputError, match="leaves fewer"):
        uniform_widths(levels, works + 0.02, "unet")


def test_a_ratio_that_removes_nothing_names_the_nearest_that_works():
    levels = levels_of(REFERENCE, "unet")
    with pytest.raises(InputError, match=r"0\.005 removes nothing: channels go in steps of 16") as caught:
        uniform_widths(levels, 0.005, "unet")
    assert uniform_widths(levels, float(caught.value.fix.split()[1]), "unet").removed > 0


def test_a_network_as_narrow_as_its_norm_groups_is_refused():
    levels = levels_of({**REFERENCE, "block_out_channels": [32, 32, 32], "attention_head_dim": 1}, "unet")
    with pytest.raises(InputError, match="removes nothing") as caught:
        uniform_widths(levels, 0.3, "unet")
    assert caught.value.fix == "this network is as narrow as its norm groups allow"


def test_other_networks_are_refused_by_name():
    with pytest.raises(InputError, match="VQModel cannot be pruned"):
        levels_of({"_class_name": "VQModel"}, "vae")


def test_the_level_that_bears_least_keeps_most():
    levels = levels_of(REFERENCE, "unet")
    weights = (10.0, 1.0, 1.0)  # an error of the first level costs ten times as much

    def error_of(widths):
        return math.sqrt(sum((w * (1 - remaining / level.width)) ** 2
                             for w, remaining, level in zip(weights, widths.remaining, levels, strict=True)))

    found = scan(levels, error_of)
    assert [max(errors) for errors in found] == [64, 128, 192] and all(len(e) <= 7 for e in found)
    widths = sensitive_widths(levels, 0.3, found)
    assert widths.remaining[0] == 64 and abs(widths.removed - 0.3) <= 0.03
    assert error_of(widths) < error_of(uniform_widths(levels, 0.3, "unet"))
    assert widths == make_widths(levels, widths.remaining)
