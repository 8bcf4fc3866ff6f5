"""Calibration of U-Nets for inpainting: masks of many kinds and sizes, and recordings of images under them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from calibration.trajectory.inpainting_masks import KINDS, paint_mask
from calibration.trajectory.prompts import STEPS, InpaintingEpisode, plan_episodes
from calibration.trajectory.recorder import Recording, record
from runtimes.bundle.tensors import TensorSpec
from runtimes.pipeline.diffusion import Pipeline
from tests.calibration.test_recorder import make as make_ordinary
from tests.runtimes import fakes
from tests.runtimes.fakes import CHANNELS, DDIM, FACTOR, FACTS, FakeSession, fake_sessions, tokenize

PROMPTS = ("one", "two", "three")


def paint(sample: np.ndarray, timestep: np.ndarray, encoder_hidden_states: np.ndarray) -> np.ndarray:
    mask, masked = sample[:, CHANNELS:CHANNELS + 1], sample[:, CHANNELS + 1:]
    return fakes.unet(sample[:, :CHANNELS], timestep, encoder_hidden_states) + (1 - mask) * masked * np.float32(0.1)


def inpainting_sessions() -> dict[str, FakeSession]:
    """The fakes with a U-Net that takes a mask and a masked image too."""
    sessions = fake_sessions()
    unet = sessions["unet"].component
    wide = TensorSpec("sample", "float32", ("batch", 2 * CHANNELS + 1, "height", "width"))
    sessions["unet"] = FakeSession("unet", replace(unet, inputs=(wide, *unet.inputs[1:])), paint)
    return sessions


def make(root: Path, samples: int = 64, sessions: dict[str, FakeSession] | None = None, seed: int = 0) -> Recording:
    return record(sessions or inpainting_sessions(), lambda taps: Pipeline(taps, FACTS, DDIM, tokenize),
                  plan_episodes(PROMPTS, samples, seed=seed, inpaints=True), root, source="fakes", guidance_scale=5.0)


def masks_of(recording: Recording) -> np.ndarray:
    """(calls, rows, H/f, W/f)."""
    return np.stack([call["sample"][:, CHANNELS] for call in recording.calls("unet")])


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(384, 384), (320, 640)])
def test_a_mask_covers_the_share_that_is_asked_for(kind: str, height: int, width: int):
    for painted, seed in product((0.05, 0.3, 0.6, 0.9), range(5)):
        mask = paint_mask(kind, height, width, painted, seed, grain=8)
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) == {0, 255}
        assert np.mean(mask == 255) == pytest.approx(painted, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_too_small_for_the_latents_or_for_what_it_keeps(kind: str):
    for painted, seed in product((0.01, 0.03), range(50)):
        assert paint_mask(kind, 32, 48, painted, seed, grain=4)[::4, ::4].any()
    if kind != "strokes":
        for seed in range(50):
            assert not paint_mask(kind, 32, 48, 0.93, seed, grain=4)[::4, ::4].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_mask_and_another_seed_another(kind: str):
    masks = [paint_mask(kind, 64, 64, 0.4, seed) for seed in range(8)]
    assert np.array_equal(masks[3], paint_mask(kind, 64, 64, 0.4, 3))
    assert len({mask.tobytes() for mask in masks}) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_image_may_be_painted(kind: str):
    assert (paint_mask(kind, 16, 24, 1.0, 0) == 255).all()


# ---- plans -------------------------------------------------------------------------------------------------------


def planned(samples: int) -> list[InpaintingEpisode]:
    episodes = plan_episodes(PROMPTS, samples, inpaints=True)
    assert all(isinstance(episode, InpaintingEpisode) for episode in episodes)
    return [episode for episode in episodes if isinstance(episode, InpaintingEpisode)]


@pytest.mark.parametrize("samples", [8, 9, 100, 512])
def test_as_many_calls_as_asked_for_are_planned_half_of_them_under_masks(samples: int):
    episodes = planned(samples)
    first, second = (sum(len(keep) for keep in keeps) for keeps in zip(*((e.keep, e.second_keep) for e in episodes),
                                                                       strict=True))
    assert first + second == samples
    assert second == samples // 2


def test_a_plan_mixes_kinds_sizes_and_strengths():
    episodes = planned(16 * 8)
    assert set(Counter(e.mask for e in episodes).values()) == {4}
    assert len({(e.mask, e.strength) for e in episodes}) == 2 * len(KINDS)
    assert sum(e.strength == 1 for e in episodes) > len(episodes) / 2
    shares = np.sort([e.painted for e in episodes])
    assert shares[0] < 0.1
    assert shares[-1] == 1
    assert np.diff(shares).max() < 0.2


def test_calls_under_masks_cover_the_whole_schedule_evenly():
    full = np.concatenate([e.second_keep for e in planned(512) if e.strength == 1])
    assert set(np.bincount(full, minlength=STEPS)) <= set(range(6, 12))


# ---- recordings --------------------------------------------------------------------------------------------------


def test_masks_are_binary_and_of_many_sizes_and_both_branches_see_the_same(tmp_path: Path):
    recording = make(tmp_path)
    masks = masks_of(recording)
    assert len(masks) == 64
    assert set(np.unique(masks)) == {0, 1}
    assert (masks[:, 0] == masks[:, 1]).all()
    areas = masks[:, 0].mean(axis=(1, 2))
    assert np.mean(areas == 1) >= 0.5  # text to image paints everything
    assert len(np.unique(areas[areas < 1])) >= 6
    assert areas.min() < 0.25


def test_what_the_unet_sees_of_the_image_is_what_the_encoder_makes_of_it(tmp_path: Path):
    """The fakes' encoder picks pixels, so the kept part can be read in its inputs, and the hole is grey."""
    recording = make(tmp_path)
    told = [call["sample"][0] for call in recording.calls("unet")]
    seen = [call["sample"][0, :CHANNELS, ::FACTOR, ::FACTOR] for call in recording.calls("vae_encoder")]
    for latents in told:
        mask, masked = latents[CHANNELS], latents[CHANNELS + 1:] / FACTS.codec.scaling_factor
        assert min(np.abs(masked - image).mean() for image in seen) < 0.3  # the encoder's own spread is exp(-1.5)
        assert np.abs(masked[:, mask == 1]).mean() < 0.3
        if (mask == 0).sum() > 8:
            images = [image[:, mask == 0].ravel() for image in seen]
            kept = masked[:, mask == 0].ravel()
            assert max(np.corrcoef(kept, image)[0, 1] for image in images if image.std() > 0) > 0.9


def test_masked_images_are_painted_from_noise_alone_and_from_their_own_latents(tmp_path: Path):
    sessions = inpainting_sessions()
    make(tmp_path, samples=24, sessions=sessions)
    assert len(sessions["unet"].calls) == 3 * STEPS + 2 * STEPS + int(0.6 * STEPS)
    # Grey for each first trajectory, the masked image for each second one, the whole image for the partial one.
    assert len(sessions["vae_encoder"].calls) == 3 + 3 + 1


def test_equal_seeds_give_equal_recordings_and_other_seeds_other_masks(tmp_path: Path):
    one, two, other = make(tmp_path / "1"), make(tmp_path / "2"), make(tmp_path / "3", seed=1000)
    assert one.identity == two.identity != other.identity
    for a, b in zip(one.calls("unet"), two.calls("unet"), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(masks_of(one), masks_of(other))


def test_a_lost_shard_is_recorded_again_and_the_others_stay(tmp_path: Path):
    recording = make(tmp_path, samples=24)
    shard = recording.folder / "shard-0001.npz"
    content = shard.read_bytes()
    shard.unlink()
    sessions = inpainting_sessions()
    make(tmp_path, samples=24, sessions=sessions)
    assert len(sessions["unet"].calls) == 2 * STEPS
    assert shard.read_bytes() == content


def test_recordings_of_other_unets_keep_their_identity(tmp_path: Path):
    """Written down when noise became PyTorch's: what was recorded and quantized since is found again."""
    assert make_ordinary(tmp_path).identity == "3bf6d5d9556b5f5fc8b9cc27db59d363e0cd88465818355ed9d6a0259b3d2dca"
