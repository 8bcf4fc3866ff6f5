"""A large component is worked on in a process of its own, and however that process ends, the user reads one line."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deploy.building import builder
from deploy.core import isolation
from deploy.core.plan import Pass, Planned, Step
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.passes.load import Load
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component, Manifest
from runtimes.errors import DeployError, InputError, ParityError, UnavailableError


class Scripted(Pass):
    """Does what its step's config says."""

    name: ClassVar[str] = "scripted"
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ()
    verify: ClassVar[bool] = False

    def plan(self, before: Manifest, spec: Any) -> Planned:
        raise NotImplementedError

    def run(self, step: Step, name: str, source: Bundle, out: Path) -> Component:
        todo = step.config["do"]
        if todo == "work":
            file = out / "components" / name / "process"
            file.parent.mkdir(parents=True)
            file.write_text(str(os.getpid()))
            planned = step.after.components[name]
            return replace(planned, file=f"components/{name}/process", files=records_below(file.parent, out))
        if todo == "full":
            raise OSError("1920 requested and 224 written")  # numpy's tofile
        if todo == "refuse":
            raise InputError("the weights are odd", where="unet", fix="get others")
        if todo == "memory":
            raise MemoryError
        if todo == "bug":
            raise KeyError("nothing of that name")
        if todo == "exit":
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, todo))
        raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> Bundle:
    return open_origin(BuildSpec(model=str(tiny_model)))


def run(source: Bundle, todo: str, out: Path) -> isolation.Result:
    step = Step("scripted", 1, {"do": todo}, {"unet": ("unet",)}, source.manifest, "")
    return isolation.run_isolated(Scripted(), step, "unet", source, out)


def test_the_work_is_done_elsewhere_and_its_memory_is_reported(source: Bundle, tmp_path: Path) -> None:
    result = run(source, "work", tmp_path)
    assert int((tmp_path / "components/unet/process").read_text()) != os.getpid()
    assert set(result.component.files) == {"components/unet/process"}
    assert result.component.axes == source.component("unet").axes
    assert 5e6 < result.peak_rss_bytes < 2e9


@pytest.mark.parametrize(("todo", "kind", "words"), [
    ("SIGKILL", UnavailableError, ("pass scripted, unet: ", "killed by the system", "memory ran out", "--shapes")),
    ("SIGSEGV", UnavailableError, ("ended by SIGSEGV", "goes on from here")),
    ("memory", UnavailableError, ("pass scripted, unet: memory ran out", "more memory")),
    ("full", UnavailableError, ("the disk is full", "free some space")),
    ("refuse", InputError, ("unet: the weights are odd (get others)",)),
    ("bug", DeployError, ("pass scripted, unet: KeyError: 'nothing of that name'",)),
    ("exit", DeployError, ("ended with code 7: it said nothing",)),
])
def test_every_end_is_one_line(
    todo: str, kind: type[DeployError], words: tuple[str, ...], source: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        run(source, todo, tmp_path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_only_large_components_get_a_process(source: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("scripted", 1, {}, {"unet": ("unet",)}, source.manifest, "")
    assert not isolation.is_large(step, "unet", source)
    size = sum(record.bytes for record in source.component("unet").files.values())
    monkeypatch.setattr(isolation, "ABOVE_BYTES", size - 1)
    assert isolation.is_large(step, "unet", source)


def test_a_real_pass_leaves_the_same_component_as_in_this_process(source: Bundle, tmp_path: Path) -> None:
    step = Load().plan(source.manifest, BuildSpec())
    assert isinstance(step, Step)
    here = Load().run(step, "text_encoder", source, tmp_path / "here")
    there = isolation.run_isolated(Load(), step, "text_encoder", source, tmp_path / "there")
    assert there.component == here


def test_a_large_component_is_built_elsewhere(source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("scripted", 1, {"do": "work"}, {"unet": ("unet",)}, source.manifest, "")
    monkeypatch.setattr(isolation, "ABOVE_BYTES", 0)
    memory: list[int] = []
    builder._run_component(Scripted(), step, "unet", source, memory, tmp_path)
    assert int((tmp_path / "components/unet/process").read_text()) != os.getpid()
    assert len(memory) == 1


def test_a_parity_error_keeps_its_exit_code() -> None:
    told = {"kind": "ParityError", "what": "too far off", "where": "unet", "fix": ""}
    error = isolation._as_error(told, "pass x")
    assert type(error) is ParityError and error.exit_code == 3
