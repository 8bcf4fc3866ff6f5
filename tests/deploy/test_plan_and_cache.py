"""Planning and caching with passes that write text instead of networks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deploy.building.builder import _run_pass, workspace
from deploy.core.pass_cache import Cache, key_of
from deploy.core.plan import Pass, Skip, Step, load_passes, plan_all
from deploy.core.spec import BuildSpec
from deploy.passes import PASSES
from runtimes.bundle.details import Details
from runtimes.bundle.folder import Bundle, records_below, write_manifest
from runtimes.bundle.manifest import SCHEMA, Component, FileRecord, Manifest, Source, digest_of
from runtimes.bundle.roles import Roles
from runtimes.bundle.tensors import Axis, ShapeRange
from runtimes.errors import DeployError, InputError
from tests.runtimes.roles import stable_diffusion as sd_roles
from tests.runtimes.roles import with_fact


class Shout(Pass):
    """Upper-cases the files of every component."""

    name: ClassVar[str] = "shout"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    verify: ClassVar[bool] = False
    ran: ClassVar[list[str]] = []

    def plan(self, before, spec):
        if any(c.format == "loud" for c in before.components.values()):
            raise InputError("already loud", fix="shout once")
        after = {n: dataclasses.replace(c, format="loud", files={}) for n, c in before.components.items()}
        manifest = dataclasses.replace(before, components=after)
        return Step(self.name, self.version, {}, {n: (n,) for n in after}, manifest, "")

    def run(self, step, name, source, out):
        self.ran.append(name)
        component = source.component(name)
        (out / component.file).parent.mkdir(parents=True)
        (out / component.file).write_text((source.path / component.file).read_text().upper())
        return dataclasses.replace(step.after.components[name], files=records_below(out / "components" / name, out))


class Whisper(Shout):
    name = "whisper"

    def plan(self, before, spec):
        return Skip("quiet already")


class Liar(Shout):
    name = "liar"

    def run(self, step, name, source, out):
        return dataclasses.replace(super().run(step, name, source, out), precision="int8")


class Killed(Shout):
    name = "shout"

    def run(self, step, name, source, out):
        component = super().run(step, name, source, out)
        if name == "vae":
            raise KeyboardInterrupt
        return component


def roles_of(scaling_factor: float) -> Roles:
    """Of a pipeline whose networks are files of text: none of them has the inputs of a role."""
    return with_fact(sd_roles(4, 8, scaling_factor, 64, 64, 16), "denoiser.component", "elsewhere")


def make_bundle(folder: Path, **texts: str) -> Bundle:
    components = {}
    for name, text in texts.items():
        file = folder / "components" / name / "model.txt"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        components[name] = Component("text", f"components/{name}/model.txt", records_below(file.parent, folder), (), (),
                                     {}, "Text", "fp32", len(text))
    manifest = Manifest(SCHEMA, "text", Source("text", {}), "onnxruntime", "fp32", roles_of(1.0),
                        components, (), {}, {}, {}, verified=False)
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    Shout.ran.clear()
    return make_bundle(tmp_path / "source", unet="unet", vae="vae")


def run(instance: Pass, bundle: Bundle, cache: Cache, folder: Path) -> tuple[Bundle, dict]:
    step = instance.plan(bundle.manifest, BuildSpec())
    assert isinstance(step, Step)
    return _run_pass(instance, step, bundle, folder, cache)


def test_a_pass_is_run_once_and_then_taken_from_the_cache(bundle: Bundle, tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    first, made = run(Shout(), bundle, cache, tmp_path / "1")
    second, cost = run(Shout(), bundle, cache, tmp_path / "2")
    assert Shout.ran == ["unet", "vae"]
    assert cost["reused"] == 2 and cost["components"] == made["components"], "what it once cost is still told"
    assert cost["seconds_without_cache"] == pytest.approx(made["seconds"], abs=0.01)
    assert first.manifest.digest == second.manifest.digest
    assert Bundle.open(second.path).file("components/vae/model.txt").read_text() == "VAE"


def test_a_change_of_the_vae_never_rebuilds_the_unet(bundle: Bundle, tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    run(Shout(), bundle, cache, tmp_path / "1")
    Shout.ran.clear()
    run(Shout(), make_bundle(tmp_path / "changed", unet="unet", vae="other"), cache, tmp_path / "2")
    assert Shout.ran == ["vae"]


def test_a_new_version_of_the_pass_or_a_new_config_has_another_key(bundle: Bundle):
    step = Shout().plan(bundle.manifest, BuildSpec())
    keys = {key_of(Shout(), s, "unet", bundle) for s in (
        step, dataclasses.replace(step, version=2), dataclasses.replace(step, config={"volume": 11}))}
    assert len(keys) == 3


class Trajectory(Shout):
    """What it writes depends on the sampling loop."""

    reads_pipeline: ClassVar[bool] = True


@pytest.mark.parametrize("change", [
    {"files": {"scheduler/scheduler_config.json": FileRecord(2, "b")}},
    {"files": {"tokenizer/tokenizer.json": FileRecord(2, "b")}},
    {"pipeline": roles_of(0.5)},
], ids=["scheduler", "tokenizer", "facts"])
def test_a_pass_that_reads_the_sampling_loop_has_its_own_key_for_each_and_others_do_not(bundle: Bundle, change: Any):
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, **change))
    for kind, differs in ((Trajectory, True), (Shout, False)):
        step = kind().plan(bundle.manifest, BuildSpec())
        keys = {key_of(kind(), step, "unet", b) for b in (bundle, other)}
        assert (len(keys) == 2) == differs


def test_the_passes_that_generate_or_calibrate_say_that_they_read_the_sampling_loop():
    reading = {instance.name for instance in load_passes(PASSES) if instance.reads_pipeline}
    assert reading == {"adapters", "prune-vae", "prune", "recover", "quantize", "precision", "engine"}


@pytest.mark.parametrize("change", [{"class_name": "Other"}, {"details": Details(source_component="x")},
                                    {"precision": "fp16"}, {"axes": {"batch": Axis("images", ShapeRange(1, 2, 3))}}])
def test_what_a_read_component_is_counts_and_where_it_lies_does_not(bundle: Bundle, change: Any):
    step = Shout().plan(bundle.manifest, BuildSpec())
    parts = {**bundle.manifest.components, "unet": dataclasses.replace(bundle.component("unet"), **change)}
    changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, components=parts))
    assert key_of(Shout(), step, "unet", changed) != key_of(Shout(), step, "unet", bundle)
    assert key_of(Shout(), step, "vae", changed) == key_of(Shout(), step, "vae", bundle)
    moved = Bundle(Path("elsewhere"), bundle.manifest)
    assert key_of(Shout(), step, "unet", moved) == key_of(Shout(), step, "unet", bundle)


def test_calibration_recordings_know_the_facts(bundle: Bundle, monkeypatch, tmp_path: Path):
    """Two models of the same networks that scale latents differently are recorded apart."""
    from deploy.quantization.calibration_data import record_calibration

    seen: list[Any] = []
    monkeypatch.setattr("calibration.trajectory.recorder.record",
                        lambda *_, source, **__: seen.append(digest_of(source)))
    calibration = {"steps": 20, "strength": 0.6, "prompts": ["a cat"], "samples": 8, "guidance_scale": 5.0}
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, pipeline=roles_of(0.5)))
    monkeypatch.setattr("runtimes.pipeline.bundle_sessions.BundleSessions", lambda *_: {})
    for b in (bundle, other, bundle):
        record_calibration(b, calibration)
    assert seen[0] == seen[2] != seen[1]


def test_a_damaged_workspace_never_belongs_to_a_running_build(tmp_path: Path):
    """However old: the lock decides, not the clock."""
    cache = Cache(tmp_path)
    with workspace(tmp_path) as work:
        os.utime(work, (0, 0))
        cache.drop_leftovers()
        assert work.is_dir()
    assert not work.exists()


def test_a_build_ends_within_the_limit_and_takes_nothing_from_one_that_runs(bundle: Bundle, tmp_path: Path,
                                                                            monkeypatch):
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", "0")
    cache = Cache(tmp_path / "cache")
    with workspace(cache.root):
        made, _ = run(Shout(), bundle, cache, tmp_path / "1")
        with workspace(cache.root):
            pass
        assert run(Shout(), bundle, cache, tmp_path / "2")[1]["reused"] == 2, "what this one uses stays"
    assert not list((cache.root / "passes").glob("[!.]*")), "nothing runs any more"
    assert Bundle.open(made.path).file("components/vae/model.txt").read_text() == "VAE", "a bundle needs no entry"


def test_an_interrupted_pass_goes_on_at_the_component_it_was_in(bundle: Bundle, tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        run(Killed(), bundle, cache, tmp_path / "1")
    Shout.ran.clear()
    run(Shout(), bundle, cache, tmp_path / "2")
    assert Shout.ran == ["vae"]
    assert not list((tmp_path / "cache").glob("passes/.partial-*"))


def test_a_damaged_cache_entry_is_made_again(bundle: Bundle, tmp_path: Path):
    cache = Cache(tmp_path / "cache")
    first, _ = run(Shout(), bundle, cache, tmp_path / "1")
    entry = next((tmp_path / "cache" / "passes").glob("*/components/unet/model.txt"))
    entry.chmod(0o644)
    entry.write_text("XXXX")
    Shout.ran.clear()
    second, _ = run(Shout(), bundle, cache, tmp_path / "2")
    assert Shout.ran == ["unet"]
    assert Bundle.open(second.path).manifest.digest == first.manifest.digest


def test_a_result_that_differs_from_the_plan_is_refused(bundle: Bundle, tmp_path: Path):
    with pytest.raises(DeployError, match="its plan said"):
        run(Liar(), bundle, Cache(tmp_path / "cache"), tmp_path / "1")


def test_an_order_that_cannot_work_is_refused_before_any_work_and_names_the_pass(bundle: Bundle):
    with pytest.raises(InputError, match="already loud") as caught:
        plan_all([Shout(), Shout()], bundle.manifest, BuildSpec())
    assert caught.value.where == "pass shout"
    assert Shout.ran == []


def test_a_skipped_pass_leaves_the_manifest_to_the_next(bundle: Bundle):
    planned = plan_all([Whisper(), Shout()], bundle.manifest, BuildSpec())
    assert isinstance(planned[0].planned, Skip)
    assert isinstance(planned[1].planned, Step)
