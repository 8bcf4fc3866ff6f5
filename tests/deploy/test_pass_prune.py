"""The passes `prune` and `recover`: plans, whole builds of a small model, the diffusers folder, and what is refused."""

from __future__ import annotations

import dataclasses
from importlib import util
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from deploy.building.prune_folder import prune_folder
from deploy.building.run_build import run_build
from deploy.core.budgets import BUDGETS, PRUNED, Budget
from deploy.core.plan import Skip, Step, Unavailable
from deploy.core.spec import BuildSpec
from deploy.passes.export import Export
from deploy.passes.prune import Prune
from deploy.passes.recover import Recover
from deploy.pruning.planning import teacher_of
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component
from runtimes.errors import InputError, ParityError
from tests.deploy.conftest import Cli, assert_nothing_left, assert_refused
from tests.parity.pipelines import write_model

pytestmark = pytest.mark.usefixtures("own_cache")

INSTALLED = util.find_spec("torch_pruning") is not None
needs_torch_pruning = pytest.mark.skipif(not INSTALLED, reason="the first test says what is missing")
LENIENT = {"component_relative_l2": 9.0, "trajectory_relative_l2": 9.0, "image_psnr_db": 0.0, "image_ssim": 0.0}


def test_without_torch_pruning_its_package_is_named(source, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    planned = Prune().plan(source.manifest, BuildSpec(prune=0.3))
    assert isinstance(planned, Unavailable)
    assert planned.what == "torch-pruning is not installed" and "ldm-deploy[prune]" in planned.fix
    assert isinstance(Prune().plan(source.manifest, BuildSpec(mask="textbook")), Step), "masks need torch alone"


def test_nothing_is_planned_that_was_not_asked_for(source):
    assert isinstance(Prune().plan(source.manifest, BuildSpec()), Skip)
    assert isinstance(Recover().plan(source.manifest, BuildSpec()), Skip)


def test_the_original_travels_with_the_pruned_network_until_it_has_recovered(source):
    spec = BuildSpec(prune_blocks="small", recover=5)
    pruned = Prune().plan(source.manifest, spec)
    assert isinstance(pruned, Step) and pruned.provisional, "the gate waits for the recovery"
    assert teacher_of(pruned.after) in pruned.after.components
    recovered = Recover().plan(pruned.after, spec)
    assert isinstance(recovered, Step) and not recovered.provisional
    assert sorted(recovered.after.components) == sorted(source.manifest.components)
    assert recovered.reads["unet"] == ("unet", teacher_of(pruned.after), "text_encoder")
    assert [p.name for p in recovered.after.passes] == ["prune", "recover"]


def test_a_wrong_order_is_refused(source):
    exported = dataclasses.replace(source.manifest, components={
        name: dataclasses.replace(c, format="onnx") for name, c in source.manifest.components.items()})
    with pytest.raises(InputError, match="expected safetensors"):
        Prune().plan(exported, BuildSpec(mask="2:4"))
    with pytest.raises(InputError, match="no original to learn from"):
        Recover().plan(source.manifest, BuildSpec(mask="2:4", recover=5))


@needs_torch_pruning
def test_a_pruned_and_recovered_model_is_built_smaller_with_the_same_inputs_and_outputs(tiny_model: Path,
                                                                                       tmp_path: Path):
    spec = BuildSpec(model=str(tiny_model), prune=0.4, prune_method="l2", recover=3, budget=LENIENT)
    outcome = run_build(spec, tmp_path / "b")
    manifest = outcome.bundle.manifest
    assert [p.name for p in manifest.passes] == ["load", "prune", "recover", "export", "optimize"]
    unet = manifest.components["unet"]
    assert teacher_of(manifest) not in manifest.components and not list((tmp_path / "b").rglob("*teacher*"))
    assert unet.parameters < 0.8 * _parameters(tiny_model)
    assert [s.name for s in unet.inputs] == ["sample", "timestep", "encoder_hidden_states"]
    lost = {p["name"]: p["relative_l2"]["unet"] for p in manifest.measured["passes"] if "relative_l2" in p}
    assert lost["recover"] > 1e-3, "compared with the original, not with itself"
    assert lost["export"] < 1e-4, "compared with the recovered network"
    assert run_build(spec, tmp_path / "b").up_to_date


@needs_torch_pruning
def test_pruning_beyond_the_budget_stops_the_build_and_names_the_pass(tiny_model: Path, tmp_path: Path):
    spec = BuildSpec(model=str(tiny_model), prune=0.4, prune_method="l1", budget={"component_relative_l2": 1e-4})
    with pytest.raises(ParityError) as caught:
        run_build(spec, tmp_path / "b")
    assert "prune" in str(caught.value.where) and "unet" in str(caught.value.where)
    assert_nothing_left(tmp_path)


@needs_torch_pruning
def test_importance_along_the_trajectory_and_sensitive_widths_need_only_prompts(tiny_model: Path, tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch):
    from deploy.pruning.shrink import importance, prune_network

    monkeypatch.setattr(importance, "TIMESTEPS", 3)
    monkeypatch.setattr(prune_network, "SCAN_BATCHES", 2)
    spec = BuildSpec(model=str(tiny_model), prune=0.3, prune_widths="sensitivity", verify="no")
    component = prune_folder(spec, tmp_path / "pruned")["unet"]
    assert component.details.pruning is not None
    channels = component.details.pruning.channels
    assert channels is not None and channels.method == "taylor" and sum(channels.remaining) < sum(channels.before)
    for errors, width in zip(channels.sensitivity, channels.before, strict=True):
        assert errors[str(width)] == 0 and all(e > 0 for w, e in errors.items() if w != str(width))


@needs_torch_pruning
def test_the_pruned_model_is_a_folder_that_diffusers_loads(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    model, folder = write_model(tmp_path / "model"), tmp_path / "pruned"
    prune_folder(BuildSpec(model=str(model), prune=0.4, prune_method="l2", budget=LENIENT), folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    original = StableDiffusionPipeline.from_pretrained(model)
    assert pipeline.unet.num_parameters() < original.unet.num_parameters()
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a b", num_inference_steps=2, height=32, width=32, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(("options", "words"), [
    (["--prune", "1.5"], ["prune", "less than 1"]),
    (["--prune", "-0.1"], ["prune", "greater than or equal to 0"]),
    (["--recover", "10"], ["--recover", "nothing is pruned that could recover"]),
    (["--mask", "1:2"], ["mask", "'textbook'"]),
    ([], ["nothing is to be pruned"]),
])
def test_what_cannot_be_pruned_is_one_clear_line(cli: Cli, tmp_path: Path, options: list[str], words: list[str]):
    assert_refused(cli("prune", *options, "-o", tmp_path / "out"), *words)
    assert_nothing_left(tmp_path / "out") if (tmp_path / "out").exists() else None


@needs_torch_pruning
@pytest.mark.parametrize(("ratio", "words"), [
    ("0.9", ["0.9 of the 32 channels of level 1 leaves fewer than the 16", "prune 0.62 or less"]),
    ("0.01", ["removes nothing", "or more"]),
    ("0.6", ["0.6 would make neighbouring levels equally wide", "prune 0.17"]),
])
def test_a_ratio_that_does_not_fit_names_one_that_does(cli: Cli, tiny_model: Path, tmp_path: Path, ratio: str,
                                                       words: list[str]):
    result = cli("build", tiny_model, "--prune", ratio, "-o", tmp_path / "out")
    assert result.code == 2 and not (tmp_path / "out").exists()
    for word in words:
        assert word in result.err.splitlines()[-1]


def _parameters(model: Path) -> int:
    from exporters.families.open_source import open_source

    return open_source(model).components["unet"].parameters


def test_a_weight_that_export_breaks_stops_the_build_of_a_pruned_model(tiny_model: Path, tmp_path: Path, monkeypatch):
    """The budget of pruning is wide; what follows is compared with the pruned network, by its own."""
    run = Export.run

    def broken(self: Export, step: Step, name: str, source: Bundle, out: Path) -> Component:
        component = run(self, step, name, source, out)
        if name == "unet":
            file = out / component.file
            model = onnx.load(file)
            weight = next(w for w in model.graph.initializer if w.name.endswith("conv_in.weight"))
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
            onnx.save(model, file)
            component = dataclasses.replace(component, files=records_below(file.parent, out))
        return component

    spec = BuildSpec(model=str(tiny_model), prune_blocks="small", budget={
        k: v for k, v in LENIENT.items() if k != "component_relative_l2"})
    monkeypatch.setattr("deploy.core.budgets.BUDGETS", {**BUDGETS, PRUNED: Budget(9.0, 9.0, 0.0, 0.0, 100.0)})
    whole = run_build(spec, tmp_path / "whole", cache_root=tmp_path / "cache").bundle.manifest
    figures = {p["name"]: p["relative_l2"]["unet"] for p in whole.measured["passes"]
               if "unet" in p.get("relative_l2", {})}
    assert figures["prune"] > 0.01 and figures["export"] < 1e-4, "each pass is compared with what it was given"
    assert (whole.components["unet"].parity or {})["relative_l2"] == figures["optimize"]
    monkeypatch.setattr(Export, "run", broken)
    with pytest.raises(ParityError, match="relative_l2") as refused:
        run_build(spec, tmp_path / "b", cache_root=tmp_path / "other")
    assert "export" in str(refused.value) and "unet" in str(refused.value)
    assert not (tmp_path / "b").exists()
