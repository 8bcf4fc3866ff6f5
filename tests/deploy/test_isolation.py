"""Work in a process of its own: results and errors come back, and a death is one clear error."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from deploy import isolation
from deploy.build import run_build
from deploy.spec import BuildSpec
from runtimes.bundle import Bundle
from runtimes.errors import DeployError, InputError, OutOfMemoryError, UnavailableError


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    os._exit(3)


def refuse() -> None:
    raise InputError("unusable", where="a file", fix="another")


def test_results_and_memory_come_back():
    result, peak = isolation.isolated(partial(divmod, 7, 3), "here")
    assert result == (2, 1)
    assert peak > 1 << 20


def test_an_error_comes_back_as_it_is():
    with pytest.raises(InputError) as caught:
        isolation.isolated(refuse, "here")
    assert str(caught.value) == "a file: unusable (another)"


@pytest.mark.parametrize(("work", "kind", "words"), [
    (partial(kill, signal.SIGKILL), OutOfMemoryError, "pass export, unet: the kernel killed .* more memory"),
    (partial(kill, signal.SIGTERM), UnavailableError, "ended by SIGTERM"),
    (leave, DeployError, "code 3 and no answer"),
])
def test_a_death_is_one_clear_error(work, kind, words):
    with pytest.raises(kind, match=words):
        isolation.isolated(work, "pass export, unet")


@pytest.mark.slow
def test_isolated_passes_make_the_same_bundle(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = BuildSpec(model=str(tiny_model), verify=False)

    def build(name: str) -> Bundle:
        return run_build(spec, tmp_path / name / "bundle", cache_root=tmp_path / name / "cache").bundle

    together = build("together")
    monkeypatch.setattr(isolation, "ISOLATE_ABOVE_BYTES", 0)
    assert build("apart").manifest.digest == together.manifest.digest
