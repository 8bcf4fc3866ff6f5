"""`verify` asks the source for what the bundle holds; the comparing itself is tested in tests/parity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.building import verify as module
from deploy.building.gate import Gate
from deploy.cli.console import show_verification
from deploy.core.budgets import budget_for
from deploy.core.pass_cache import Cache
from deploy.core.spec import BuildSpec
from deploy.parity.comparison_effort import Effort
from deploy.parity.comparison_options import ParityOptions
from deploy.parity.components import ComponentReport, Figures
from deploy.parity.verdict import Verification
from deploy.parity.whole_pipelines import PipelineReport
from tests.runtimes.fakes import AFFINE, FACTS, affine_bundle, cached_pipeline, write_bundle


class Asked(Exception):
    """What the origin was opened with."""


@pytest.mark.parametrize(("name", "option"), [("unet_shallow", "step_cache"), ("safety_checker", "safety_checker")])
def test_the_source_is_opened_with_what_the_bundle_was_built_with(tmp_path: Path, monkeypatch, name: str, option: str):
    def asked(spec):
        raise Asked(spec.step_cache, spec.safety_checker)

    monkeypatch.setattr(module, "open_origin", asked)
    pipeline = cached_pipeline()
    known = {part: session.component for part, session in pipeline.sessions.items()}
    parts = {}
    for part in ("unet", name):
        file = tmp_path / "b" / "components" / part / "model.onnx"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"graph")
        parts[part] = replace(known.get(part, AFFINE), file=f"components/{part}/model.onnx")
    bundle = write_bundle(tmp_path / "b", parts, pipeline.roles if option == "step_cache" else FACTS)
    with pytest.raises(Asked) as caught:
        module.verify_bundle(bundle.path, str(tmp_path))
    assert caught.value.args == (option == "step_cache", option == "safety_checker")


def verification(relative_l2: float = 0.0, unverified: str = "") -> Verification:
    figures = Figures(0.0, relative_l2, 1.0, 0, ((1, 4),), "y", (1, 4))
    report = ComponentReport({"unet": figures}, {"vae_decoder": unverified} if unverified else {})
    return Verification(report, PipelineReport({}), budget_for("fp32"), Effort("components", ParityOptions()))


@pytest.mark.parametrize(("result", "said", "unsaid"), [
    (verification(), "ok", "broken"),
    (verification(relative_l2=1.0), "budget broken", "could be verified"),
    (verification(relative_l2=1.0, unverified="no GPU"), "budget broken", "could be verified"),
    (verification(unverified="no GPU"), "not everything could be verified here", "broken"),
])
def test_only_a_broken_budget_is_called_broken(result: Verification, said: str, unsaid: str, capsys):
    show_verification(result)
    out = capsys.readouterr().out
    assert said in out.splitlines()[-1] and unsaid not in out


def test_a_cached_proof_is_of_the_runtime_that_computed_it(tmp_path: Path, monkeypatch):
    bundle = affine_bundle(tmp_path / "b")
    gate = Gate(BuildSpec(), "model", Cache(tmp_path / "cache"))
    compared: list[str] = []

    def compare(reference, proof, name):
        compared.append(name)
        return ComponentReport({name: Figures(0.0, 0.0, 1.0, 0, ((1, 4),), "y", (1, 4))}, {})

    monkeypatch.setattr(gate, "_compare", compare)
    machine = {"driver": "550"}
    monkeypatch.setattr("deploy.building.gate.runtime_identity", lambda device, kind: dict(machine))
    for driver, calls in (("550", 1), ("550", 1), ("560", 2), ("550", 2)):
        machine["driver"] = driver
        gate._check(SimpleNamespace(identity={}), bundle, "affine")  # type: ignore[arg-type]
        assert len(compared) == calls
