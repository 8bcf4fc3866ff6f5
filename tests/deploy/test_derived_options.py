"""A command made from fields: what it receives, what its help says, and that nothing is imported before it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer

from deploy.cli.derived_options import Option, derived_command, from_dataclass


@dataclass(frozen=True)
class Order:
    dishes: tuple[str, ...] = field(metadata={"help": "what to cook", "argument": "DISH", "required": True})
    guests: int = field(default=2, metadata={"help": "who eats [at the table]", "least": 1,
                                             "flags": ("-n", "--guests")})
    salt: float | None = field(default=None, metadata={"help": "share of salt", "above": 0, "most": 1,
                                                       "default": "the cook's own"})
    heat: Literal["low", "high"] = field(default="low", metadata={"help": "of the oven"})
    plates: bool = field(default=True, metadata={"help": "bring plates", "flags": ("--plates/--no-plates",)})
    keep_warm: bool = field(default=False, metadata={"help": "leave it in the oven"})
    recipe: Path | None = field(default=None, metadata={"help": "file with the recipe"})
    extra: tuple[str, ...] = field(default=(), metadata={"help": "what else; may be given again"})
    internal: int = 0


@pytest.fixture
def given(capsys: pytest.CaptureFixture[str]):
    """Run the command; returns what it received, or what it printed."""
    app, received = typer.Typer(), []

    @derived_command(app, lambda: from_dataclass(Order))
    def order(values: dict[str, Any]) -> None:
        """Cook."""
        received.append(values)

    @app.command()
    def other() -> None:
        """Nothing."""

    def run(*arguments: str) -> Any:
        with pytest.raises(SystemExit):
            app(["order", *arguments])
        return received.pop() if received else capsys.readouterr()
    return run


def test_a_command_receives_only_what_was_given(given):
    assert given("soup") == {"dishes": ["soup"]}
    assert given("soup", "-n", "0", "--no-plates", "--keep-warm", "--extra", "a", "--extra", "b", "--recipe", "r") == {
        "dishes": ["soup"], "guests": 0, "plates": False, "keep_warm": True, "extra": ["a", "b"], "recipe": Path("r")}


def test_help_states_range_choices_and_default(given, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    shown = given("--help").out
    for text in ("Cook.",
                 "who eats [at the table]; at least 1; default 2", "above 0, at most 1; default the cook's own",
                 "of the oven; one of low or high; default low", "bring plates; default on", "default off",
                 "default none"):
        assert text in shown
    assert "internal" not in shown


def test_a_missing_argument_and_a_word_for_a_number_are_refused(given):
    assert "DISH" in given().err
    assert "--guests" in given("soup", "--guests", "two").err


def test_a_field_that_no_option_can_hold_is_refused():
    @dataclass
    class Odd:
        table: dict[str, int] = field(default_factory=dict, metadata={"help": "seats"})

    with pytest.raises(TypeError, match="no option can hold"):
        from_dataclass(Odd)


def test_options_are_asked_for_when_the_command_runs_not_before(capsys):
    app, asked = typer.Typer(), []

    def options() -> list[Option]:
        asked.append(1)
        return []

    @derived_command(app, options)
    def lazy(values: dict[str, Any]) -> None:
        """Works."""

    @app.command()
    def other() -> None:
        """Nothing."""

    for arguments in (["--help"], ["other"]):
        with pytest.raises(SystemExit):
            app(arguments)
    assert "lazy" in capsys.readouterr().out and not asked
    with pytest.raises(SystemExit):
        app(["lazy"])
    assert asked
