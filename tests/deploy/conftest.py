"""The command line as a function, and what tests of passes start from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.cli import progress_display
from deploy.cli.commands import main
from runtimes.bundle.folder import Bundle
from tests.parity.pipelines import source_bundle


class Result(NamedTuple):
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, build_cache: Path
) -> Cli:
    """Run the command line in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(build_cache))
    monkeypatch.setattr(progress_display, "EVERY_SECONDS", 3600.0)  # a refusal is one line on a slow machine, too

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["ldm-deploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        streams = capsys.readouterr()
        return Result(int(stop.value.code or 0), streams.out, streams.err)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only lose time to a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copy(reference_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the reference bundle that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(reference_bundle, folder)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model as the bundle that passes start from."""
    return source_bundle(tiny_model, tmp_path_factory.mktemp("source") / "b")


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, build_cache: Path) -> None:
    """Everything that is kept goes to the tests' cache."""
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(build_cache))


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    """One clear line on stderr that holds the words, and the exit code."""
    assert result.code == code, result
    assert result.err.startswith("error: "), result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    for word in words:
        assert word in result.err


def assert_nothing_left(folder: Path) -> None:
    """No file below the folder."""
    assert [p for p in folder.rglob("*") if p.is_file()] == []
