"""The table of budgets and what a user may change in it."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

from deploy.core.budgets import BUDGETS, budget_for
from runtimes.errors import InputError


def test_fp32_is_what_the_design_promises():
    budget = budget_for("fp32")
    assert budget.component_relative_l2 <= 1e-4
    assert budget.trajectory_relative_l2 <= 1e-3
    assert budget.image_psnr_db >= 50


def test_lower_precision_is_never_held_to_more():
    order = [BUDGETS[p] for p in ("fp32", "fp16", "bf16", "int8", "int4")]
    for tighter, looser in pairwise(order):
        assert tighter.component_relative_l2 <= looser.component_relative_l2
        assert tighter.trajectory_relative_l2 <= looser.trajectory_relative_l2
        assert tighter.image_psnr_db >= looser.image_psnr_db
        assert tighter.image_ssim >= looser.image_ssim
        assert tighter.retrieval_points <= looser.retrieval_points


def test_overrides_change_only_what_they_name():
    changed = budget_for("int8", {"image_psnr_db": 30})
    assert changed.image_psnr_db == 30.0
    assert dataclasses.replace(changed, image_psnr_db=BUDGETS["int8"].image_psnr_db) == BUDGETS["int8"]


def test_unknown_key_names_the_nearest():
    with pytest.raises(InputError, match="did you mean image_psnr_db") as error:
        budget_for("fp32", {"image_psnr": 40.0})
    assert error.value.exit_code == 2


def test_unknown_precision_names_the_nearest():
    with pytest.raises(InputError, match="did you mean fp16"):
        budget_for("fp61")
    with pytest.raises(InputError, match="choose one of fp32"):
        budget_for("quarter")


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_ssim", 1.01), ("image_psnr_db", -1.0), ("component_relative_l2", math.nan), ("retrieval_points", 101.0),
     ("trajectory_relative_l2", math.inf), ("image_ssim", True), ("image_ssim", "0.9")],
)
def test_senseless_limits_are_refused(key, value):
    with pytest.raises(InputError, match=key):
        budget_for("fp32", {key: value})
