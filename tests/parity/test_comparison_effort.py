"""How much is compared follows from what it costs, and is always said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.building.run_build import run_build
from deploy.core.spec import BuildSpec, make_spec
from deploy.parity.comparison_effort import LIMIT_MACS, choose, image_macs
from deploy.parity.comparison_options import ParityOptions
from deploy.parity.reference.planned_shapes import halved_sizes, plan_runs
from deploy.parity.verdict import verify
from runtimes.bundle.manifest import Component
from runtimes.bundle.roles import Roles
from runtimes.bundle.tensors import ShapeRange
from runtimes.errors import InputError
from tests.parity.test_gate import FP32
from tests.parity.test_shapes import FACTS, sizes, stable_diffusion

DEFAULTS = ParityOptions()
LATENT_ROWS = ShapeRange(8, 64, 256)


def weighing(unet: int, decoder: int, rows: ShapeRange = LATENT_ROWS) -> dict[str, Component]:
    """Stable Diffusion's components with so many weights."""
    found: Mapping[str, Component] = stable_diffusion(ShapeRange(1, 1, 8), rows)
    counts = {"unet": unet, "vae_decoder": decoder}
    return {name: replace(c, parameters=counts.get(name, 1)) for name, c in found.items()}


SD15 = weighing(859_520_964, 49_490_199)
SMALL = weighing(15_800_000, 2_000_000, ShapeRange(8, 8, 32))


def test_a_small_model_is_compared_in_full():
    effort = choose("auto", DEFAULTS, SMALL, FACTS)
    assert effort.level == "full" and effort.options == DEFAULTS
    assert effort.text == "full: components at several sizes; images of 8 prompts by ddim and dpm++, 25 steps"


def test_stable_diffusion_is_compared_quickly_and_says_why():
    effort = choose("auto", DEFAULTS, SD15, FACTS)
    assert effort.level == "quick" and effort.options.small
    assert 1 <= len(effort.options.prompts) and effort.options.height == effort.options.width == 256
    assert image_macs(effort.options, SD15, FACTS, (32, 32)) <= LIMIT_MACS
    assert LIMIT_MACS < image_macs(DEFAULTS, SD15, FACTS, (64, 64))
    assert "would take an estimated 6" in effort.text and "T multiply-accumulates" in effort.text
    assert effort.to_json()["level"] == "quick" and effort.to_json()["text"] == effort.text


def test_the_user_can_ask_for_all_of_it():
    assert choose("full", DEFAULTS, SD15, FACTS).options == DEFAULTS


def test_a_image_of_one_size_only_is_generated_at_that_size():
    fixed = weighing(859_520_964, 49_490_199, ShapeRange(64, 64, 64))
    assert choose("auto", DEFAULTS, fixed, FACTS).options.height == 512


def test_sizes_are_halved_down_to_the_smallest():
    assert halved_sizes(SD15, FACTS) == [(64, 64), (32, 32), (16, 16), (8, 8)]
    assert halved_sizes(stable_diffusion(ShapeRange(1, 1, 1), ShapeRange(64, 64, 64)), FACTS) == [(64, 64)]


def test_large_networks_meet_the_common_size_once_with_the_smallest_batch_and_others_next_to_the_smallest():
    runs = plan_runs(SD15, FACTS, small=True)
    common, smallest, third = sizes(runs, "unet")
    assert common == (1, 64, 64) and smallest == (2, 8, 8)
    assert third[0] % 2 == 1 and third[1] != third[2] and max(third[1:]) <= 24
    assert [run.once for run in runs] == [True, False, False]


def test_without_images_only_the_components_are_compared(source, reference, options):
    facts: Roles = source.manifest.pipeline
    result = verify(reference, source, FP32, choose("components", options, source.manifest.components, facts))
    found = result.to_json()
    assert result.ok and set(found["components"]) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert found["images"]["count"] == 0 and found["trajectory"]["relative_l2"] == []
    assert found["compared"]["text"].endswith("(asked for): components at several sizes; no images")


def test_a_quick_build_says_so_in_its_manifest(tiny_model: Path, build_cache: Path, tmp_path: Path):
    spec = BuildSpec(model=str(tiny_model), verify="quick", prompts=("a cat", "a dog"))
    parity = run_build(spec, tmp_path / "bundle", cache_root=build_cache).bundle.manifest.parity
    assert parity is not None
    assert parity["compared"]["level"] == "quick" and parity["compared"]["steps"] == 4
    assert parity["images"]["count"] == 1 and len(parity["trajectory"]["relative_l2"]) == 4


def test_yaml_reads_no_as_false_and_so_do_we(tmp_path: Path):
    (tmp_path / "build.yaml").write_text("verify: no\n")
    assert make_spec({}, tmp_path / "build.yaml").verify == "no"
    with pytest.raises(InputError, match="verify"):
        make_spec({"verify": "a bit"})
