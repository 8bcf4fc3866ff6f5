"""Pruned networks: what is removed together, and that plain diffusers builds and loads what is left."""

from __future__ import annotations

from importlib import util

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from deploy.pruning.shrink.whole_blocks import remove_blocks
from deploy.pruning.shrink.widths import config_of, levels_of, uniform_widths
from deploy.pruning.shrink.zeroed_weights import mask_textbook, mask_two_of_four
from runtimes.bundle.roles import Role
from runtimes.errors import InputError

needs_torch_pruning = pytest.mark.skipif(
    util.find_spec("torch_pruning") is None, reason="test_pass_prune's first test says what is missing")
CROSS, PLAIN = "CrossAttn", ""


def unet(levels=(CROSS, CROSS, PLAIN), widths=(32, 48, 48), heads=2, layers=1, **more):
    """A U-Net with Stable Diffusion's blocks; every normalization's weights number its channels."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=layers,
        down_block_types=[f"{kind}DownBlock2D" for kind in levels],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(levels)],
        cross_attention_dim=12, attention_head_dim=heads, norm_num_groups=8, **more)
    return network.eval().requires_grad_(False)


def numbered(network):
    """Every normalization's weights number its channels from 1, so that the pruned ones tell which stayed."""
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.weight.copy_(torch.arange(1, len(layer.weight) + 1))
    return network


def feeds():
    return [torch.rand(1, 4, 4, 4), torch.rand(1), torch.rand(1, 3, 12)]


def pruned(network, ratio=0.35, method="l2"):
    from deploy.pruning.shrink.importance import scorer_of
    from deploy.pruning.shrink.structured import prune_network

    widths = uniform_widths(levels_of(config_of(network), "unet"), ratio, "unet")
    return prune_network(network, {Role.DENOISER: feeds()}, widths, scorer_of(method), "unet")


def run(network):
    sample, states = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 12)
    with torch.no_grad():
        return network(sample, torch.tensor([5, 900]), states).sample


@needs_torch_pruning
@pytest.mark.parametrize("network", [
    unet(), unet(layers=2, heads=(1, 3, 4), use_linear_projection=True),
    unet(levels=(PLAIN, CROSS, CROSS), time_embedding_dim=64, transformer_layers_per_block=2),
], ids=["sd15", "sd2", "deep"])
def test_diffusers_loads_what_is_left_of_a_unet(network, tmp_path):
    smaller = pruned(network)
    smaller.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.num_parameters() < 0.6 * network.num_parameters()
    names = smaller.state_dict()
    assert all(torch.equal(weight, names[name]) for name, weight in loaded.state_dict().items())
    # Equal weights in other memory promise equal results to the rounding of float32 sums, not to the bit: oneDNN picks
    # kernels by strides and alignment, and on a processor with AMX it chose two that differ.
    torch.testing.assert_close(run(loaded), run(smaller), rtol=1e-4, atol=1e-5)
    assert run(loaded).shape == (2, 4, 8, 8)


@needs_torch_pruning
def test_channels_of_a_skip_connection_go_from_both_of_its_ends_and_norm_groups_stay_even():
    network = numbered(unet())
    smaller = pruned(network)
    stream = smaller.down_blocks[0].resnets[0].norm1.weight.int() - 1  # what is left of conv_in's channels
    assert 0 < len(stream) < 32
    assert len({int(((stream >= g * 4) & (stream < g * 4 + 4)).sum()) for g in range(8)}) == 1
    assert torch.equal(smaller.conv_in.weight, network.conv_in.weight[stream])
    concatenated = smaller.up_blocks[-1].resnets[-1].norm1.weight.int() - 1
    assert torch.equal(concatenated[-len(stream):] - 32, stream)
    joined = network.up_blocks[-1].resnets[-1].conv1.weight[:, concatenated]
    rows = smaller.up_blocks[-1].resnets[-1].norm2.weight.int() - 1
    assert torch.equal(smaller.up_blocks[-1].resnets[-1].conv1.weight, joined[rows])
    assert torch.equal(smaller.up_blocks[-1].resnets[-1].time_emb_proj.bias,
                       network.up_blocks[-1].resnets[-1].time_emb_proj.bias[rows])


@needs_torch_pruning
def test_gate_and_value_of_the_feed_forward_go_in_pairs():
    network = unet()
    layer = network.down_blocks[0].attentions[0].transformer_blocks[0].ff
    layer.net[0].proj.bias.copy_(torch.arange(256))  # 128 values, then their 128 gates
    smaller = pruned(network)
    value, gate = smaller.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[0].proj.bias.chunk(2)
    assert len(value) < 128 and torch.equal(gate - 128, value)


@needs_torch_pruning
def test_the_weakest_head_is_removed_whole_and_logits_keep_their_scale():
    network = unet(levels=(CROSS, CROSS), widths=(32, 48), heads=(2, 3))  # of 3 heads of 16, 2 of 16 remain
    attention = network.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.weight[16:32] *= 0.01
    attention.to_out[0].weight[:, 16:32] *= 0.01
    smaller = pruned(network, 0.3)
    after = smaller.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert after.heads == 2 and after.to_v.out_features == 32
    for layer in (after.to_q, after.to_k, after.to_v):
        assert float(layer.weight.abs().mean(1).min()) > 0.02, "no row of the weak head is left"


@needs_torch_pruning
def test_the_time_embedding_reads_fewer_sinusoids_and_says_the_same():
    network = unet()
    smaller = pruned(network)
    steps = torch.arange(0, 1000, 7)
    with torch.no_grad():
        before = network.time_embedding.linear_1(network.time_proj(steps))
        after = smaller.time_embedding.linear_1(smaller.time_proj(steps))
    assert smaller.time_proj.num_channels < network.time_proj.num_channels
    distance = torch.cdist(after.T, before.T) / before.norm(dim=0)
    # These weights are random, the hardest case: each output is still nearest to one of before, by far.
    assert float(distance.min(1).values.mean()) < 0.4 * float(distance.median())


@needs_torch_pruning
def test_the_time_embedding_keeps_weights_of_its_own_size():
    """Sinusoids that hardly differ from a constant once gave it weights of four million: infinite in float16."""
    network = unet(levels=(CROSS, CROSS), widths=(64, 96))
    smaller = pruned(network, 0.3)
    for name, weight in smaller.time_embedding.linear_1.named_parameters():
        before = network.time_embedding.linear_1.get_parameter(name)
        assert weight.abs().max() < 100 * before.abs().max(), name


@needs_torch_pruning
def test_an_autoencoder_is_pruned_in_both_halves_and_loads(tmp_path):
    from deploy.pruning.shrink.importance import scorer_of
    from deploy.pruning.shrink.structured import prune_network

    network = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4).requires_grad_(False)
    widths = uniform_widths(levels_of(config_of(network), "vae"), 0.5, "vae")
    examples = {Role.IMAGE_ENCODER: [torch.rand(1, 3, 8, 8)], Role.IMAGE_DECODER: [torch.rand(1, 4, 4, 4)]}
    smaller = prune_network(network, examples, widths, scorer_of("l1"), "vae")
    smaller.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.num_parameters() < 0.4 * network.num_parameters()
    assert loaded(torch.ones(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("kind", "resnets", "mid"), [("base", 3, True), ("small", 3, False), ("tiny", 2, False)])
def test_blocks_are_removed_as_bk_sdm_does_and_diffusers_loads_the_rest(kind, resnets, mid, tmp_path):
    network = unet(layers=2)
    smaller = remove_blocks(network, kind, "unet")
    smaller.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert sum(len(block.resnets) for block in loaded.down_blocks) == resnets
    assert sum(len(block.resnets) for block in loaded.up_blocks) == 2 * resnets
    assert (loaded.mid_block is not None) == mid
    assert run(loaded).shape == (2, 4, 8, 8)
    assert torch.equal(loaded.up_blocks[-1].resnets[-1].conv1.weight, network.up_blocks[-1].resnets[2].conv1.weight)


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="one layer already"):
        remove_blocks(unet(), "base", "unet")
    with pytest.raises(InputError, match="32 and 48 channels"):
        remove_blocks(unet(levels=(CROSS, CROSS), widths=(32, 48)), "tiny", "unet")
    small = remove_blocks(unet(), "small", "unet")
    with pytest.raises(InputError, match="no mid block"):
        remove_blocks(small, "small", "unet")


def test_the_textbook_recipe_zeroes_filters_and_weights_and_leaves_no_mask():
    network = unet()
    names = set(network.state_dict())
    mask_textbook(network)
    assert set(network.state_dict()) == names
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert int((layer.weight.abs().sum((1, 2, 3)) == 0).sum()) == round(0.3 * layer.out_channels)
        elif isinstance(layer, nn.Linear):
            assert int((layer.weight == 0).sum()) == round(0.3 * layer.weight.numel())


def test_two_of_four_keeps_the_larger_half_of_every_four_inputs():
    layers = (nn.Conv2d(8, 5, 3), nn.Linear(12, 7), nn.Conv2d(6, 5, 1))
    network = nn.Sequential(*layers).requires_grad_(False)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    mask_two_of_four(network)
    assert torch.equal(layers[2].weight, before["2.weight"]), "6 inputs are no multiple of 4"
    for index in (0, 1):
        groups = layers[index].weight.movedim(1, -1).unflatten(-1, (-1, 4))
        full = before[f"{index}.weight"].movedim(1, -1).unflatten(-1, (-1, 4)).abs()
        assert ((groups != 0).sum(-1) == 2).all()
        assert torch.allclose(groups.abs().sum(-1), full.topk(2, dim=-1).values.sum(-1))
