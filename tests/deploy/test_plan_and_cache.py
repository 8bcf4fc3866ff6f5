"""Planning and caching with passes that write text instead of networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest

from deploy.builder import Silent, _run_pass
from deploy.cache import Cache, key_of
from deploy.plan import Pass, Skip, Step, plan_all
from deploy.spec import BuildSpec
from runtimes.bundle import Bundle, records_below, write_manifest
from runtimes.errors import DeployError, InputError
from runtimes.manifest import SCHEMA, Component, Manifest, PipelineFacts, Source


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


def make_bundle(folder: Path, **texts: str) -> Bundle:
    components = {}
    for name, text in texts.items():
        file = folder / "components" / name / "model.txt"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        components[name] = Component("text", f"components/{name}/model.txt", records_below(file.parent, folder), (), (),
                                     {}, "Text", "fp32", len(text))
    manifest = Manifest(SCHEMA, "text", Source("text", {}), "onnxruntime", "fp32", PipelineFacts(4, 8, 1.0, 64, 64, 16),
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
    return _run_pass(instance, step, bundle, folder, cache, Silent())


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
