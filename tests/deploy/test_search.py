"""`--precision auto`: which trial wins, what is refused, and a whole search on a small model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration.recipes import candidates, one_graph
from deploy.building.run_build import run_build
from deploy.cli import console
from deploy.core.budgets import Budget
from deploy.core.spec import BuildSpec
from deploy.quantization import precision_search
from deploy.quantization.precision_search import Trial, Trials, search
from runtimes.bundle.folder import Bundle
from runtimes.bundle.roles import Conditioner, TextEncoder
from runtimes.errors import ParityError
from runtimes.system.cache_root import rooted
from tests.runtimes.fakes import AFFINE, affine_bundle
from tests.runtimes.roles import stable_diffusion, with_fact


class FakeTrials(Trials):
    """Accuracy by name, size by the file."""

    def __init__(self, psnr_db: dict[str, float], retrieval: dict[str, float], least_db: float) -> None:
        self.done: list[Trial] = []
        self._psnr_db, self._retrieval, self._least_db = psnr_db, retrieval, least_db

    def generate(self, name: str, unet: Path) -> Trial:
        psnr = self._psnr_db[name]
        trial = Trial(name, unet.stat().st_size, 0.1, psnr, 0.9, self._retrieval.get(name, 1.0), psnr >= self._least_db)
        self.done.append(trial)
        return trial


def run(tmp_path: Path, hybrid_bytes: int, psnr_db: dict[str, float], least_db: float = 20.0, **retrieval: float):
    def write(name: str, size: int) -> Path:
        (tmp_path / name).write_bytes(bytes(size))
        return tmp_path / name

    trials = FakeTrials(psnr_db, {k.replace("_", " "): v for k, v in retrieval.items()}, least_db)
    file, name = search(trials, write("hybrid", hybrid_bytes), lambda n: write(f"n{n}", 1000 + n), 4)
    return trials, file, name


ALL = {f"{n} promotions": 10.0 + 10 * n for n in range(5)}


def test_the_fewest_promotions_that_hold_win_over_a_larger_hybrid(tmp_path):
    _, file, name = run(tmp_path, 5000, {**ALL, "hybrid": 40.0})
    assert (file.name, name) == ("n1", "1 promotions")


def test_hybrid_wins_where_it_is_smaller_and_holds(tmp_path):
    assert run(tmp_path, 900, {**ALL, "hybrid": 40.0})[2] == "hybrid"


def test_a_smaller_one_that_generates_less_than_hybrid_recognizably_does_not_win(tmp_path):
    arguments: dict[str, Any] = {"1_promotions": 0.9, "2_promotions": 1.0}
    assert run(tmp_path, 5000, {**ALL, "hybrid": 40.0}, **arguments)[2] == "2 promotions"


def test_a_budget_that_cannot_be_met_is_refused_with_the_best_found(tmp_path):
    with pytest.raises(ParityError, match="no assignment of precisions keeps the budget") as error:
        run(tmp_path, 5000, {**ALL, "hybrid": 15.0}, least_db=99.0)
    assert "4 promotions" in str(error.value)
    assert error.value.exit_code == 3


def test_the_front_holds_what_nothing_else_beats(tmp_path):
    trials, _, _ = run(tmp_path, 5000, {**ALL, "hybrid": 12.0})
    front = [point["name"] for point in trials.front()]
    assert "hybrid" not in front
    assert front == sorted(front)


def test_an_interrupted_search_generates_no_trial_twice(reference_bundle: Path, tmp_path: Path, monkeypatch):
    generated: list[str] = []

    def generate(self: Trials, name: str, unet: Path) -> Trial:
        generated.append(name)
        return Trial(name, unet.stat().st_size, 0.1, 30.0, 0.9, None, True)

    monkeypatch.setattr(Trials, "_generated", generate)
    (tmp_path / "a.onnx").write_bytes(b"a")
    (tmp_path / "b.onnx").write_bytes(b"b")
    with rooted(tmp_path):
        for prompts in (("a cat",), ("a cat",), ("a dog",)):  # the second is the same search begun again
            trials = Trials(Bundle.open(reference_bundle), {}, Budget(1, 1, 0, 0, 0), prompts)
            results = [trials.generate(name, tmp_path / f"{name}.onnx") for name in "ab"]
            assert [t.name for t in results] == ["a", "b"]
    assert generated == ["a", "b", "a", "b"]


@pytest.mark.parametrize("timed", [{"time_ratio": 0.72}, {}], ids=["timed", "from before calls were timed"])
def test_the_front_of_a_bundle_is_shown(tmp_path: Path, capsys, timed: dict[str, float]):
    trial = {"name": "hybrid", "bytes": 1000, "trajectory_relative_l2": 0.1, "psnr_db": 30.0, "ssim": 0.9,
             "retrieval": None, "holds": True, **timed}
    file = tmp_path / "components" / "unet" / "quantization.json"
    file.parent.mkdir(parents=True)
    found = {"front": [trial], "precision_map": {"conv": "int8"}, "errors": {"conv": {"int8": 0.5}}}
    file.write_text(json.dumps(found))
    manifest = SimpleNamespace(pipeline=stable_diffusion(4, 8, 0.18215, 64, 64, 77))
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=manifest, component=lambda name: SimpleNamespace(
        graph=SimpleNamespace(quantization=SimpleNamespace(chosen="hybrid"))))
    console.show_search(bundle)
    shown = capsys.readouterr().out
    assert "hybrid (chosen)" in shown and ("0.72" in shown) == bool(timed)
    assert "1 layers int8; most error in integers, predicted: conv (0.5)" in shown


class Searched(Exception):
    """What a search would have tried, and how."""


@pytest.mark.parametrize("encoders", [(), ("text_encoder",), ("text_encoder", "text_encoder_2"), ("bert",)])
def test_a_search_quantizes_whatever_else_generates_and_takes_the_methods(tmp_path: Path, monkeypatch, encoders):
    """A model without prompts has no text encoder, Stable Diffusion XL two, and nothing says that one has that name."""
    parts = (*encoders, "unet", "vae_decoder", "vae_encoder")
    prepared: list[Any] = []
    readers = tuple(TextEncoder(name, "tokenizer", 77, "last_hidden_state") for name in encoders)
    context = "encoder_hidden_states" if encoders else ""
    roles = with_fact(stable_diffusion(4, 8, 0.18215, 64, 64, 77), "conditioner", Conditioner(readers, context))
    file = affine_bundle(tmp_path / "b").file(AFFINE.file)
    source: Any = SimpleNamespace(
        manifest=SimpleNamespace(pipeline=roles), file=lambda _: file,
        component=lambda name: SimpleNamespace(file={n: n for n in parts}[name]))
    recording: Any = SimpleNamespace(calls=lambda _: iter(()), spread=lambda *_: [])

    def prepare(graph: Any, methods: Any, *_: Any) -> Any:
        prepared.append(methods)
        return graph

    monkeypatch.setattr(candidates, "prepare", prepare)
    monkeypatch.setattr(candidates, "find_layers", lambda _: [])
    monkeypatch.setattr(candidates, "predict_noise", lambda *_: {})
    monkeypatch.setattr(candidates, "find_ranges", lambda *_: ({}, {"ranges": {}}))
    monkeypatch.setattr(one_graph, "channel_means", lambda *_: prepared.append("means"))
    monkeypatch.setattr(precision_search, "quantize_by_recipe", lambda *_: {})

    def trials(source, low, budget, prompts):
        raise Searched(sorted(low))

    monkeypatch.setattr(precision_search, "Trials", trials)
    methods = ("smoothquant", "bias-correction")
    config = {"recipes": dict.fromkeys(parts, "hybrid"), "scheme": {}, "estimator": "mse", "keep": [],
              "methods": list(methods), "relative_l2": 0.1,
              "search": {"budget": asdict(Budget(1, 1, 0, 0, 0)), "prompts": []}}
    with pytest.raises(Searched) as caught:
        precision_search.search_denoiser(source, tmp_path / "out.onnx", config, recording)
    assert caught.value.args[0] == sorted((*encoders, "vae_decoder"))
    assert prepared == [methods, "means"]


@pytest.mark.slow
def test_a_whole_search_keeps_the_budget_and_is_written_down(tiny_model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    spec = BuildSpec(model=str(tiny_model), precision="auto", calibration_samples=8, budget={"image_psnr_db": 20.0})
    bundle = run_build(spec, tmp_path / "bundle", cache_root=tmp_path / "cache").bundle
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["images"]["psnr_db"] >= 20.0
    details = json.loads((bundle.path / "components/unet/quantization.json").read_text())
    assert details["front"]
    assert set(details["errors"]) == set(details["precision_map"])
    impossible = spec.model_copy(update={"budget": {"image_psnr_db": 150.0}})
    with pytest.raises(ParityError, match="the best found"):
        run_build(impossible, tmp_path / "no", cache_root=tmp_path / "cache")
    assert not (tmp_path / "no").exists()
