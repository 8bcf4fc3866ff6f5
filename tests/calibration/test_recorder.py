"""Recording: strata, both branches, shards, resuming, bounded memory; prompts from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.trajectory.prompts import plan_episodes, read_prompts
from calibration.trajectory.recorder import Recording, record
from runtimes.errors import InputError
from runtimes.pipeline.diffusion import Pipeline
from runtimes.system.progress import listening
from tests.heard import Heard
from tests.runtimes.fakes import DDIM, FACTS, fake_sessions, tokenize


def make(root: Path, samples: int = 16, sessions=None, **changes: Any) -> Recording:
    settings: dict[str, Any] = {"source": "fakes", "guidance_scale": 5.0} | changes
    return record(sessions or fake_sessions(), lambda taps: Pipeline(taps, FACTS, DDIM, tokenize),
                  plan_episodes(("one", "two", "three"), samples), root, **settings)


def test_both_guidance_branches_and_the_whole_schedule_are_recorded(tmp_path):
    recording = make(tmp_path, samples=64)
    calls = list(recording.calls("unet"))
    assert len(calls) == 64
    for call in calls:
        assert len(call["sample"]) == 2
        assert not np.array_equal(call["encoder_hidden_states"][0], call["encoder_hidden_states"][1])
    steps = np.histogram([call["timestep"][0] for call in calls], bins=10, range=(0, 1000))[0]
    assert steps.min() >= 3


def test_the_encoder_sees_the_images_that_image_to_image_starts_from(tmp_path):
    recording = make(tmp_path, samples=16)
    images = list(recording.calls("vae_encoder"))
    assert len(images) == recording.shards == 2
    assert all(call["sample"].shape == (1, 3, 32, 32) for call in images)
    assert len(list(recording.calls("vae_decoder"))) == 4
    texts = {call["input_ids"].tobytes() for call in recording.calls("text_encoder")}
    assert len(texts) == 4  # three and the empty one


def test_equal_settings_give_equal_recordings_and_anything_else_another(tmp_path):
    one, two = make(tmp_path / "1"), make(tmp_path / "2")
    assert one.identity == two.identity
    for a, b in zip(one.calls("unet"), two.calls("unet"), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert make(tmp_path / "3", guidance_scale=3.0).identity != one.identity
    assert make(tmp_path / "4", source="other").identity != one.identity


def test_a_finished_recording_runs_no_network_again(tmp_path):
    make(tmp_path)
    sessions = fake_sessions()
    make(tmp_path, sessions=sessions)
    assert all(not session.calls for session in sessions.values())


def test_an_interrupted_recording_goes_on_at_the_shard_it_was_in(tmp_path):
    class Stop(Exception):
        pass

    class Stopping(Heard):
        def advanced(self, done: int, total: int, unit: str) -> None:
            if done == 2:
                raise Stop

    with pytest.raises(Stop), listening(Stopping()):
        make(tmp_path, samples=32)
    sessions = fake_sessions()
    recording = make(tmp_path, samples=32, sessions=sessions)
    whole = make(tmp_path / "whole", samples=32)
    assert len(sessions["unet"].calls) == 2 * (20 + 12)  # two of the four episodes
    for a, b in zip(recording.calls("unet"), whole.calls("unet"), strict=True):
        assert np.array_equal(a["sample"], b["sample"])


def test_a_damaged_shard_is_recorded_again(tmp_path):
    recording = make(tmp_path)
    shard = recording.folder / "shard-0001.npz"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    make(tmp_path)
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "no prompt"), (b"\n  \n", "no prompt"), (b"a\xff", "not UTF-8")])
def test_a_prompt_file_that_cannot_be_used_is_refused(tmp_path: Path, content, complaint):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        read_prompts(file)
    assert error.value.where == str(file)


def test_prompts_are_lines(tmp_path: Path):
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Ei mit Öl \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("a cat", "ein Ei mit Öl")


@pytest.mark.parametrize("samples", [1, 7])
def test_too_few_samples_are_refused(samples):
    with pytest.raises(InputError, match="range of activations"):
        plan_episodes(("a",), samples)


@pytest.mark.parametrize("samples", [8, 9, 100, 512])
def test_exactly_as_many_calls_as_asked_for_are_planned(samples):
    episodes = plan_episodes(("a", "b"), samples)
    assert sum(len(e.keep) + len(e.second_keep) for e in episodes) == samples
    assert len({e.seed for e in episodes}) == len(episodes)


def test_few_calls_still_come_from_every_part_of_the_schedule(tmp_path):
    recording = make(tmp_path, samples=128)
    for count in (6, 8, 16):
        timesteps = [call["timestep"][0] for call in recording.spread("unet", count)]
        assert len(timesteps) == count
        assert min(timesteps) < 300
        assert max(timesteps) > 700
