"""Presets follow the Pareto front of what was measured: their order, their limits, and what they say without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.errors import InputError, UnavailableError
from runtimes.inputs import quality_presets as presets
from runtimes.inputs.quality_presets import Measured, Setting
from runtimes.system.cache_root import rooted


def entry(steps: int, milliseconds: float, psnr: float, retrieval: float | None = None, **options) -> Measured:
    return Measured(Setting(steps, **options), milliseconds, psnr, retrieval)


SEEN = [entry(25, 300, 40, 1.0), entry(20, 240, 35, 1.0), entry(12, 150, 24, 0.99), entry(13, 160, 23, 0.99),
        entry(8, 80, 17, 0.985), entry(4, 40, 12, 0.7)]
BLIND = [entry(25, 300, 40), entry(12, 150, 24), entry(8, 90, 21), entry(4, 40, 12)]


def test_the_front_leaves_out_what_is_beaten_in_both():
    assert [m.setting.steps for m in presets.front(SEEN)] == [4, 8, 12, 20, 25]
    assert presets.front(SEEN[::-1]) == presets.front(SEEN)


def test_retrieval_counts_before_decibels():
    assert [m.setting.steps for m in presets.front([entry(1, 10, 30, 0.5), entry(2, 20, 20, 0.9)])] == [1, 2]
    assert [m.setting.steps for m in presets.front([entry(1, 10, 20, 0.9), entry(2, 20, 30, 0.5)])] == [1]


@pytest.mark.parametrize(("measured", "steps"), [(SEEN, (8, 12, 25)), (BLIND, (8, 12, 25))])
def test_presets_are_in_order_and_a_draft_is_still_the_image(measured, steps):
    assert tuple(presets.preset(quality, measured).setting.steps for quality in presets.QUALITIES) == steps
    assert presets.preset("high", measured).milliseconds >= 3 * presets.preset("draft", measured).milliseconds


def test_one_setting_alone_is_every_preset():
    assert {presets.preset(quality, SEEN[:1]).setting.steps for quality in presets.QUALITIES} == {25}


@pytest.mark.parametrize(("milliseconds", "steps"), [(1000, 25), (299, 20), (155, 12), (40, 4)])
def test_a_budget_buys_the_most_accurate_it_can(milliseconds, steps):
    assert presets.within(milliseconds, SEEN).setting.steps == steps


def test_a_budget_that_buys_nothing_says_what_is_needed():
    with pytest.raises(InputError, match="at least 40"):
        presets.within(39, SEEN)


def test_what_is_saved_comes_back(tmp_path):
    measured = [*SEEN, entry(9, 95, 18.0, None, scheduler="dpm++", guidance_interval=(0.1, 0.7), cache_interval=2)]
    with rooted(tmp_path):
        presets.save("abc", measured)
        assert presets.load("abc") == measured
    assert [p.name for p in (tmp_path / "tradeoffs").iterdir()] == ["abc.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"setting": {"steps": 1}}]', '[{"setting": {"magic": 1}}]'])
def test_nothing_or_a_damaged_file_is_said_with_the_command_to_run(tmp_path, text):
    (tmp_path / "tradeoffs").mkdir()
    Path(tmp_path / "tradeoffs" / "abc.json").write_text(text)
    with rooted(tmp_path), pytest.raises(UnavailableError, match="deploy tradeoffs"):
        presets.load("abc")
    with pytest.raises(InputError, match="unknown quality"):
        presets.preset("best", SEEN)
