"""A large graph is optimized once on a machine; whatever happens to what was kept, the bundle still loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from runtimes.backends import optimized_graphs
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.errors import BundleError
from tests.runtimes.fakes import affine_bundle
from tests.runtimes.test_session_ort import X, Y


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where graphs are kept; every graph counts as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(optimized_graphs, "ABOVE_BYTES", 0)
    return tmp_path / "cache" / "ldm-deploy" / "onnxruntime" / "cpu"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """Each graph that ORT opened, and whether ORT still had to optimize it."""
    seen: list[tuple[Path, bool]] = []
    real = ort.InferenceSession

    def spying(file, settings, **rest):
        seen.append((Path(file), settings.graph_optimization_level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL))
        return real(file, settings, **rest)

    monkeypatch.setattr(ort, "InferenceSession", spying)
    return seen


def entries(kept: Path) -> list[Path]:
    return sorted(kept.glob("[!.]*")) if kept.is_dir() else []


def load(bundle: Bundle) -> Session:
    return Session.open(bundle, "affine", SessionOptions(threads=1, keep_graphs=True))


def test_the_second_load_takes_what_the_first_stored_and_computes_the_same(tmp_path, kept, opened):
    bundle = affine_bundle(tmp_path / "b")
    first = load(bundle).run({"x": X})["y"]
    np.testing.assert_allclose(first, Y, rtol=1e-6)
    np.testing.assert_array_equal(load(bundle).run({"x": X})["y"], first)
    assert opened[0] == (bundle.file(bundle.component("affine").file), True)
    assert opened[1][0].is_relative_to(kept) and not opened[1][1]
    assert len(entries(kept)) == 1 and not list((kept.parents[1] / "work").iterdir())


def test_a_damaged_entry_is_replaced(tmp_path, kept, opened):
    bundle = affine_bundle(tmp_path / "b")
    load(bundle)
    (entry,) = entries(kept)
    (entry / "model.onnx").write_bytes(b"half a graph")
    np.testing.assert_allclose(load(bundle).run({"x": X})["y"], Y, rtol=1e-6)
    assert (entry / "model.onnx").read_bytes() != b"half a graph"


@pytest.mark.parametrize("hindrance", ["disk", "folder"])
def test_no_room_costs_nothing_but_time(tmp_path, kept, monkeypatch, hindrance):
    if hindrance == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    else:
        kept.parent.mkdir(parents=True)
        kept.write_text("a file where the folder should be")
    np.testing.assert_allclose(load(affine_bundle(tmp_path / "b")).run({"x": X})["y"], Y, rtol=1e-6)
    assert kept.is_file() or not entries(kept)


def test_another_processor_or_graph_gets_an_entry_of_its_own(tmp_path, kept, monkeypatch):
    load(affine_bundle(tmp_path / "b"))
    monkeypatch.setattr(optimized_graphs, "processor", lambda: "another")
    load(affine_bundle(tmp_path / "b2"))
    assert len(entries(kept)) == 2


def test_a_corrupt_graph_is_still_a_broken_bundle(tmp_path, kept):
    with pytest.raises(BundleError):
        load(affine_bundle(tmp_path / "b", b"not a graph"))
    assert not entries(kept)


def test_beyond_the_limit_what_was_used_least_recently_is_dropped(tmp_path, kept, monkeypatch):
    load(affine_bundle(tmp_path / "b"))
    (first,) = entries(kept)
    monkeypatch.setattr(optimized_graphs, "processor", lambda: "another")
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", str(int(1.5 * sum(f.stat().st_size for f in first.iterdir()))))
    load(affine_bundle(tmp_path / "b2"))
    (second,) = entries(kept)
    assert second != first
