"""Pipelines and exports that several tests share; each is made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.families.open_source import open_source
from tests.exporters.pipelines import write_pipeline


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that no test may change."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "small", prediction="v_prediction")


@pytest.fixture
def pipeline(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture(scope="session")
def exported(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Component name -> its exported model.onnx."""
    from tests.exporters.exporting import export_component

    folder, source = tmp_path_factory.mktemp("exported"), open_source(pristine)
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = export_component(source, name, folder / name).file
        return done[name]

    return get
