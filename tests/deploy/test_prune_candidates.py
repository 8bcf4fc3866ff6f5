"""Several shares of channels: which is taken, what is written down, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.building.choose_share import spec_of
from deploy.building.choose_target import require_decided
from deploy.building.run_build import run_build
from deploy.cli import console
from deploy.core.pruning_options import parse_shares
from deploy.core.spec import BuildSpec, make_spec
from runtimes.errors import InputError, ParityError
from tests.deploy.test_pass_prune import LENIENT


def spec(tiny_model: Path, **options) -> BuildSpec:
    return make_spec({"model": str(tiny_model), "prune_method": "l2", **options})


def test_prune_reads_one_share_or_several():
    assert parse_shares("0.3") == {"prune": 0.3}
    assert parse_shares("0.5, 0.3") == {"prune_candidates": (0.5, 0.3)}
    with pytest.raises(InputError, match="'half' is not a share"):
        parse_shares("0.3,half")


def test_without_pruning_nothing_recovers():
    several = BuildSpec(prune_candidates=(0.3,), recover=5, recover_prompts=("a cat",))
    assert spec_of(several, 0.3) == BuildSpec(prune=0.3, recover=5, recover_prompts=("a cat",))
    assert spec_of(several, 0.0) == BuildSpec()


def test_a_bundle_with_the_share_asked_for_alone_has_the_same_digest():
    assert "prune_candidates" not in BuildSpec(prune=0.3).resolved()
    assert spec_of(BuildSpec(prune_candidates=(0.3,)), 0.3).resolved() == BuildSpec(prune=0.3).resolved()


def test_the_largest_share_within_the_budget_is_taken(tiny_model: Path, build_cache: Path, tmp_path: Path):
    several = spec(tiny_model, prune_candidates=(0.2, 0.4), budget=LENIENT)
    built = run_build(several, tmp_path / "bundle", cache_root=build_cache).bundle
    (tried,) = built.manifest.measured["prune_candidates"]
    unet = built.component("unet")
    assert tried["prune"] == 0.4 and tried["broken"] == "" and tried["bytes"] == unet.bytes
    assert built.manifest.parity is not None
    assert tried["seconds"] > 0 and tried["psnr_db"] == built.manifest.parity["images"]["psnr_db"]
    alone = run_build(spec(tiny_model, prune=0.4, budget=LENIENT), tmp_path / "alone", cache_root=build_cache).bundle
    assert alone.manifest.digest == built.manifest.digest
    assert run_build(several, tmp_path / "bundle", cache_root=build_cache).up_to_date


def test_a_share_that_breaks_the_budget_gives_way_and_its_figures_are_stored(tiny_model: Path, build_cache: Path,
                                                                           tmp_path: Path, capsys):
    several = spec(tiny_model, prune_candidates=(0.4,), budget={**LENIENT, "trajectory_relative_l2": 0.01})
    built = run_build(several, tmp_path / "bundle", cache_root=build_cache).bundle
    refused, taken = built.manifest.measured["prune_candidates"]
    assert (refused["prune"], taken["prune"]) == (0.4, 0.0)
    assert "trajectory" in refused["broken"] and refused["trajectory_relative_l2"] > 0.01 and refused["psnr_db"] > 0
    assert taken["broken"] == "" and taken["trajectory_relative_l2"] < 0.01
    assert refused["bytes"] < taken["bytes"] == built.component("unet").bytes and refused["macs"] < taken["macs"]
    console.show_bundle(built)
    assert "U-Nets that were tried" in capsys.readouterr().out


def test_a_budget_that_no_share_keeps_is_refused_with_the_best_found(tiny_model: Path, build_cache: Path,
                                                                     tmp_path: Path):
    several = spec(tiny_model, prune_candidates=(0.4,), budget={**LENIENT, "trajectory_relative_l2": 0.0})
    with pytest.raises(ParityError, match="no share of channels keeps the budget; the best found is 0%") as error:
        run_build(several, tmp_path / "bundle", cache_root=build_cache)
    assert error.value.exit_code == 3 and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("options", "words"), [
    ({"prune": 0.3, "prune_candidates": (0.2,)}, "prune and prune_candidates are both given"),
    ({"prune_candidates": (1.5,)}, "less than 1"),
    ({"prune_candidates": (0.0,)}, "greater than 0"),
])
def test_shares_that_make_no_sense_are_refused(options, words: str):
    with pytest.raises(InputError, match=words):
        make_spec(options)


def test_a_dry_run_measures_nothing():
    with pytest.raises(InputError, match="decided by building each"):
        require_decided(BuildSpec(prune_candidates=(0.3,)))
