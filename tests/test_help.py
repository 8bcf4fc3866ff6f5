"""Whatever the documents tell a reader to run says with --help what it does or measures; help is printed whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PEERS = sorted(f"tests.peers.{file.stem}" for file in (ROOT / "tests" / "peers").glob("*.py")
               if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))
MEASURES = sorted(f"exporters.{file.stem}" for file in (ROOT / "exporters").glob("measure_*.py"))


@pytest.mark.parametrize("module", [*PEERS, *MEASURES, "tests.deploy.seams"])
def test_a_command_that_measures_says_what_with_help(module: str):
    found = subprocess.run([sys.executable, "-W", "ignore", "-m", module, "--help"], capture_output=True, text=True,
                           timeout=120, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage: ")
    described = found.stdout.split("\n\n")[1]
    assert len(described.split()) >= 6 and "options:" not in described, f"{module} does not say what it is"


def commands(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    for name, inner in getattr(command, "commands", {}).items():
        found += commands(inner, (*path, name))
    return found


def test_every_help_text_is_printed_whole(monkeypatch, capsys):
    """No bracket of it is taken for markup: `[word]` was."""
    app = importlib.import_module("deploy.cli.commands").app
    whole = typer.main.get_command(app)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    seen = 0
    for path in commands(whole):
        with pytest.raises(SystemExit):
            app([*path, "--help"], standalone_mode=True)
        shown = squeezed(capsys.readouterr().out)
        command: Any = whole
        for name in path:
            command = command.commands[name]
        for parameter in command.params:
            text = getattr(parameter, "help", "") or ""
            assert squeezed(text.replace("\\[", "[")) in shown, f"{path} {parameter.name}: {text}"
            seen += bool(text)
    assert seen > 80


def squeezed(text: str) -> str:
    """Without the table's frame and the line breaks that the width makes."""
    return re.sub(r"[\s│]+", "", text)
