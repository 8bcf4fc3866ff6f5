"""The tiny source model and its reference, whose answers are computed once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.parity.comparison_options import ParityOptions
from deploy.parity.reference.answers import Reference
from runtimes.backends.session import FORMATS
from runtimes.bundle.folder import Bundle
from tests.parity.pipelines import source_bundle, write_model

OPTIONS = ParityOptions(prompts=("a cat", "a dog"), schedulers=("ddim", "dpm++"), steps=4, recording_steps=3)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose time to a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A source bundle that no test may change."""
    folder = tmp_path_factory.mktemp("parity")
    return source_bundle(write_model(folder / "model"), folder / "source")


@pytest.fixture(scope="session")
def reference(source: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Its answers, kept on disk for the session."""
    return Reference(source, cache=tmp_path_factory.mktemp("answers"))


@pytest.fixture
def options() -> ParityOptions:
    """Few prompts and steps."""
    return OPTIONS


@pytest.fixture
def fake_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `misbehaving` bundles run."""
    monkeypatch.setitem(FORMATS, "fake", "tests.parity.pipelines:FakeSession")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Where a changed bundle goes."""
    return tmp_path / "candidate"
