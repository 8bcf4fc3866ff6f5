"""Paths and names are printed as they are, whatever brackets and colons are in them."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPTokenizer

from deploy.cli import console
from deploy.cli.bench_table import show_bench
from runtimes.errors import InputError
from runtimes.text.clip_tokenizer import prepare_tokenizer
from tests.deploy.conftest import Cli
from tests.runtimes.fakes import write_pipeline_bundle
from tests.runtimes.vocabulary import make_vocabulary

ODD = "a [bold]x[/] [fp32] [/nothing] :cat:"
NAME = "bundle " + ODD.replace("/", "")


@pytest.fixture
def odd(tmp_path: Path, cli: Cli) -> Path:
    """A bundle of a few nodes below the folder that commands run in, with an odd name."""
    vocab, merges = make_vocabulary()
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=5).save_pretrained(tmp_path / "source")
    prepare_tokenizer(tmp_path / "source", tmp_path / "work" / NAME / "tokenizer")
    return write_pipeline_bundle(tmp_path / "work" / NAME, len(vocab) + 1).path


def test_commands_print_the_whole_path_of_a_bundle(odd: Path, cli: Cli):
    assert NAME in cli("inspect", NAME).out
    made = cli("generate", NAME, "cat", "--steps", "2", "-o", f"{NAME}.png")
    assert made.code == 0 and f"{NAME}.png" in made.out, made
    assert f"r {NAME}" in cli("export-triton", NAME, "-o", f"r {NAME}").out
    reported = cli("report", NAME, "-o", f"{NAME}.html")
    assert reported.code == 0 and f"wrote {NAME}.html" in reported.err, reported
    shutil.rmtree(odd / "tokenizer")
    for command in (("inspect", NAME), ("generate", NAME, "cat"), ("verify", NAME), ("bench", NAME), ("report", NAME),
                    ("tradeoffs", NAME), ("diagnose", NAME), ("export-triton", NAME, "-o", "t")):
        refused = cli(*command)
        assert refused.code == 2 and NAME in refused.err, (command, refused)


@pytest.mark.parametrize("command", [
    ("inspect",), ("generate", "{}", "cat"), ("verify",), ("bench",), ("report",), ("tradeoffs",), ("diagnose",),
    ("export-triton", "{}", "-o", "t"), ("build",), ("prune", "{}", "--prune", "0.3"),
    ("convert", "{}", "--configs", "c", "-o", "d"), ("build", "--spec", "{}"), ("build", "--lora", "{}"),
    ("generate", "b", "--prompts", "{}"), ("build", "--target", "{}"), ("build", "--shapes", "{}"),
    ("build", "--budget", "{}"), ("build", "--target", "tensorrt", "--engine", "{}"),
    ("cache", "trim", "--limit", "{}"),
])
def test_what_is_refused_is_named_whole(command: tuple[str, ...], cli: Cli):
    arguments = [part.format(NAME) for part in command]
    refused = cli(*(arguments if NAME in " ".join(arguments) else [*arguments, NAME]))
    said = refused.err.replace("b: no such folder", NAME)  # `generate b` has no bundle to begin with
    assert refused.code == 2 and NAME in said, refused


def test_progress_lines_and_errors_are_whole(capsys):
    console.say(ODD)
    console.show_error(InputError(ODD, where=f"w {ODD}", fix=f"f {ODD}"))
    with console.shown_progress() as progress:
        progress.working(ODD)
        progress.finished(f"done {ODD}")
    err = capsys.readouterr().err
    assert err.splitlines() == [ODD, f"error: w {ODD}: {ODD} — f {ODD}", f"done {ODD}"]


def test_tables_are_whole(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 400, raising=False)
    bundle: Any = SimpleNamespace(path=Path(ODD), manifest=SimpleNamespace(measured={"notes": [ODD]}))
    console.show_outcome(SimpleNamespace(up_to_date=True, bundle=bundle))  # type: ignore[arg-type]
    console.show_repository(Path(ODD), [ODD])
    found = {"machine": {"processor": ODD, "cores": 1, "memory_bytes": 1, "instructions": []}, "gpu": {"detail": ODD},
             "build": {ODD: {"available": False, "detail": ODD, "fix": ODD}}, "run": {}}
    console.show_findings(found)
    console.show_pruned({}, Path(ODD))
    console.show_generated([Path(ODD)], count=1, load_seconds=1, generate_seconds=1, peak_rss_bytes=1)
    console.show_cache({"root": ODD, "bytes": 0, "limit_bytes": 1, "kinds": {}, "live": False})
    console.show_trimmed({"root": ODD, "before_bytes": 1, "bytes": 0, "limit_bytes": 1, "removed": 1})
    console._show_candidates([{"prune": 0.1, "bytes": 1, "macs": 1, "seconds": 1, "trajectory_relative_l2": None,
                               "psnr_db": None, "ssim": None, "retrieval": None, "broken": ODD}])
    run = {"name": ODD, "seconds": spread(), "cold_start_seconds": 1, "peak_rss_bytes": 1, "psnr_db": 1.0,
           "components": {}, "limits": {"weight_gigabytes_per_second": 1.0}}
    show_bench({"machine": found["machine"], "settings": {"threads": 1, "steps": 1, "rounds": 1}, "load_before": 0.0,
                "load_after": 0.0, "limits": {"gemm_gflops": 1.0, "copy_gigabytes_per_second": 1.0}, "ratios": {},
                "batches": [{"batch": 1}], "runs": [run]})
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(ODD) >= 14, out


def spread() -> dict[str, float]:
    return {"median": 1.0, "min": 1.0, "max": 1.0}


def test_nothing_is_printed_by_a_console_that_reads_markup(root: Path):
    """Every `Console(...)` of ours says markup=False and emoji=False, so that no call can forget to escape."""
    for package in ("deploy", "runtimes", "exporters", "calibration", "tests"):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console":
                    given = {word.arg: ast.literal_eval(word.value) for word in node.keywords
                             if word.arg in ("markup", "emoji")}
                    assert given == {"markup": False, "emoji": False}, f"{file}:{node.lineno}"
