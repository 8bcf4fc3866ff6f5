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

from deploy.cli.derived_options import in_words

ROOT = Path(__file__).resolve().parents[1]
PEERS = sorted(f"tests.peers.{file.stem}" for file in (ROOT / "tests" / "peers").glob("*.py")
               if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))
MEASURES = sorted(f"exporters.measure.{file.stem}" for file in (ROOT / "exporters" / "measure").glob("[a-z]*.py"))


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
        for parameter in parameters(whole, path):
            text = parameter.help or ""
            assert squeezed(text.replace("\\[", "[")) in shown, f"{path} {parameter.name}: {text}"
            seen += bool(text)
    assert seen > 110


def parameters(command: Any, path: tuple[str, ...]) -> list[Any]:
    """The options and arguments of a command; those that are derived from fields are made when it is called."""
    for name in path:
        command = command.commands[name]
    return list(command.make_context(path[-1], [], resilient_parsing=True).command.params)


def every_option() -> dict[str, Any]:
    """Every option of every command, by `command --option`."""
    whole = typer.main.get_command(importlib.import_module("deploy.cli.commands").app)
    return {f"{' '.join(path)} {max(option.opts, key=len)}": option for path in commands(whole)
            for option in parameters(whole, path) if option.param_type_name == "option"}


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return every_option()


def test_the_help_of_every_option_says_what_it_does_and_its_default(options):
    texts = {name: option.help or "" for name, option in options.items()}
    assert len(texts) > 110
    assert not [name for name, text in texts.items() if len(text.split("; default ")[0].split()) < 3]
    assert not [name for name, text in texts.items()
                if "; default " not in text and not options[name].required]


def test_the_help_of_a_number_says_its_range(options):
    numbers = {name: option.help for name, option in options.items()
               if re.search("int|float", str(option.type_descriptor.annotation))}
    assert len(numbers) > 10
    spans = re.compile(r"(at least|above|at) [\d.]+|[\d.]+ to [\d.]+|one of \d|sizes that the bundle was built for")
    assert not {name: text for name, text in numbers.items() if not spans.search(text)}


def test_the_default_in_the_help_is_the_one_that_holds(options):
    """Options of derived commands have no default of their own: their text is the field's, which holds."""
    assert not {name: option.help for name, option in options.items()
                if option.default not in (None, "", [], False, 0)
                and not option.help.endswith(f"; default {in_words(option.default)}")}


def test_help_texts_have_the_fields_words(options):
    words = re.compile(r"(?i)\b(pictures?|drawn?|drawings?|told|kept|beg[au]n|borne?|may come again)\b")
    assert not {name: option.help for name, option in options.items() if words.search(option.help or "")}


def squeezed(text: str) -> str:
    """Without the table's frame and the line breaks that the width makes."""
    return re.sub(r"[\s│]+", "", text)
