"""Large networks are compared when their graphs are finished; the first pass that breaks the budget is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from deploy.building.run_build import run_build
from deploy.core.plan import Pass
from deploy.core.spec import BuildSpec
from deploy.parity import comparison_effort
from deploy.passes.export import Export
from deploy.passes.optimize import Optimize
from runtimes.bundle.folder import Bundle, records_below
from runtimes.bundle.manifest import Component
from runtimes.errors import ParityError


@pytest.fixture(autouse=True)
def every_network_counts_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_effort, "LIMIT_MACS", 0.0)


def spec(model: Path, **options: Any) -> BuildSpec:
    return BuildSpec(model=str(model), verify="components", **options)


def damaging(kind: type[Pass], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass writes one weight of the U-Net twice as large; of a version of its own, so that no cache knows it."""
    run = kind.run

    def damaged(self: Any, step: Any, name: str, source: Bundle, out: Path) -> Component:
        component = run(self, step, name, source, out)
        if name != "unet":
            return component
        model = onnx.load(out / component.file)
        weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
        weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
        onnx.save(model, out / component.file)
        return replace(component, files=records_below(out / "components" / name, out))

    monkeypatch.setattr(kind, "run", damaged)
    monkeypatch.setattr(kind, "version", 99)


def test_only_the_last_pass_over_the_graphs_is_compared(tiny_model: Path, build_cache: Path, tmp_path: Path) -> None:
    manifest = run_build(spec(tiny_model), tmp_path / "bundle", cache_root=build_cache).bundle.manifest
    compared = {cost["name"]: cost.get("relative_l2", {}) for cost in manifest.measured["passes"]}
    assert not compared["export"] and set(compared["optimize"]) == set(manifest.components)
    assert manifest.verified and all(c.parity is not None for c in manifest.components.values())


def test_a_target_of_another_format_does_not_hide_the_graph(
    tiny_model: Path, build_cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    built = run_build(spec(tiny_model, target="openvino"), tmp_path / "bundle", cache_root=build_cache).bundle
    compared = {cost["name"] for cost in built.manifest.measured["passes"] if cost.get("relative_l2")}
    assert compared == {"optimize", "openvino"}


@pytest.mark.parametrize("kind", [Export, Optimize])
def test_the_pass_that_broke_it_is_named(
    kind: type[Pass], tiny_model: Path, build_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaging(kind, monkeypatch)
    with pytest.raises(ParityError) as caught:
        run_build(spec(tiny_model), tmp_path / "bundle", cache_root=build_cache)
    assert caught.value.where == f"pass {kind.name}, unet"
