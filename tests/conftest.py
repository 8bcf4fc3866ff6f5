"""What every test shares: a quiet, offline, repeatable environment, and the fixtures used in more than one file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before any library is imported, and inherited by every child process of a test.
os.environ |= {
    "HF_HUB_OFFLINE": "1",  # a test that reaches for the network must fail, not pass on one machine
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="ldm-deploy-hf-"),  # nothing that a user once downloaded leaks in
    "TOKENIZERS_PARALLELISM": "false",  # otherwise it warns after each fork
    "COLUMNS": "120",  # rich and typer wrap at the terminal's width; captured output has none
    "NO_COLOR": "1",
}
for _variable in ("LDM_DEPLOY_CACHE", "LDM_DEPLOY_CACHE_LIMIT", "XDG_CACHE_HOME"):
    os.environ.pop(_variable, None)  # a developer's own; tests name theirs
# The two cores that CI has, shared by the workers of `make test`; sums keep their order on a larger machine.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

RunPython = Callable[..., str]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keep `--doctest-modules` from importing helpers: in tests, only test_*.py and __init__.py are collected."""
    inside = collection_path.is_relative_to(TESTS) and collection_path.suffix == ".py"
    if inside and not collection_path.name.startswith(("test_", "__init__", "conftest")):
        return True
    return None


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run code in a new interpreter and give back its stdout; a failure shows both streams."""

    def run(code: str, *arguments: str | Path, cwd: Path = ROOT, timeout_seconds: float = 300) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    return run


# ---- bundles -------------------------------------------------------------------------------------------------
# `reference_bundle`: the folder of the reference model built for ONNX Runtime, made once a session, read-only.


@pytest.fixture(scope="session")
def build_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all builds of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reference_bundle(build_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model for ONNX Runtime, verified."""
    from deploy.building.run_build import run_build
    from deploy.core.spec import BuildSpec

    folder = tmp_path_factory.mktemp("reference") / "bundle"
    return run_build(BuildSpec(), folder, cache_root=build_cache).bundle.path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight pipeline in the old file layout that builds in seconds: 3 VAE levels, v-prediction."""
    from tests.exporters.pipelines import to_old_layout
    from tests.parity.pipelines import write_model

    model = write_model(tmp_path_factory.mktemp("model") / "tiny")
    to_old_layout(model)
    return model
