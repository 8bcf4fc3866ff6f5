"""Commands whose options are a list: made from the fields of a dataclass or a pydantic model, or written one by one.

Name, help text, default, range and choices of an option are written once, at the field that it fills. Nothing is
checked here but the type: ranges and choices are refused by the class that the values go to, with its own error.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand


@dataclass(frozen=True)
class Option:
    """One option of a command, or one argument.

    Attributes:
        name: key of the value in what the command receives; `--name`, with `-` for `_`, unless there are `flags`.
        type: str, int, float, bool (a flag), Path, or a list of one of the first three (may be given again).
        help: what it does, without range, choices and default, which are appended.
        default: what holds where it is not given: a value, or words for one ("the model's own"). "" leaves it out,
            where `help` says it or the argument is required.
        flags: as typer writes them: ("-n", "--count"), ("--metadata/--no-metadata",).
        choices: every value that is accepted.
        least, above, most, below: the range of a number; `above` and `below` are themselves outside.
        argument: its name in capitals if it has no flag but a place.
        required: whether the command cannot run without.
    """

    name: str
    type: Any
    help: str
    default: object = ""
    flags: tuple[str, ...] = ()
    choices: tuple[object, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    argument: str = ""
    required: bool = False

    @property
    def text(self) -> str:
        """The whole help text: what it does; its choices or range; its default."""
        values = f"; one of {joined(self.choices)}" if self.choices else f"; {span}" if (span := self.span) else ""
        default = "" if self.default == "" else f"; default {in_words(self.default)}"
        return f"{self.help}{values}{default}"

    @property
    def span(self) -> str:
        """The range in words, or nothing: "at least 1", "above 0, at most 1", "0 to 1"."""
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return ", ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


def joined(choices: Sequence[object]) -> str:
    """`a, b or c`."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last


def in_words(default: object) -> str:
    """A default as help texts write it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, Sequence) and not isinstance(default, str):
        return ", ".join(map(str, default)) or "none"
    if isinstance(default, float):
        return f"{default:g}"
    return "none" if default is None or default == {} else str(default)


def from_dataclass(described: Any, *names: str) -> list[Option]:
    """Options for those fields of a dataclass whose metadata has a "help", or for the named ones.

    The metadata's keys are the attributes of `Option`; type, choices of a Literal and default are the field's own
    unless they are there, too.
    """
    hints = get_type_hints(described)
    options = []
    for field in dataclasses.fields(described):
        if field.name in names if names else "help" in field.metadata:
            said = field.metadata
            kind, choices = (said["type"], ()) if "type" in said else command_line_type(hints[field.name])
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            given = {"choices": choices, "default": "" if default is dataclasses.MISSING else default, "type": kind}
            options.append(Option(field.name, **{**given, **field.metadata}))
    return options


def command_line_type(annotation: Any) -> tuple[Any, tuple[object, ...]]:
    """What a field's values are on the command line, and the choices if it is a Literal.

    `str | None` is a str that need not be given; a tuple is an option that may be given again.

    Raises:
        TypeError: nothing that a command line can hold.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return command_line_type(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if len(kinds) == 1:
            return command_line_type(kinds[0])
    if origin is Literal:
        return type(arguments[0]), arguments
    if origin in (tuple, list):
        kind, choices = command_line_type(arguments[0])
        return list[kind], choices  # type: ignore[valid-type]
    if isinstance(annotation, type) and origin is None:
        return annotation, ()
    raise TypeError(f"no option can hold {annotation}: give its type in the field's metadata")


def derived_command(
    app: typer.Typer, options: Callable[[], Sequence[Option]]
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[dict[str, Any]], None]]:
    """Make a function a command of `app` with these options: it receives the values that were given, by name.

    `options` is called when the command is, so that `--help` of the whole, and other commands, do not import the
    libraries that the fields need. The function's name and docstring are the command's.
    """
    def register(run: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        class Derived(TyperCommand):
            def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
                return typer_command(run, options()).make_context(info_name, args, parent, **extra)

        app.command(run.__name__.replace("_", "-"), cls=Derived, help=inspect.getdoc(run))(lambda: None)
        return run
    return register


def typer_command(run: Callable[[dict[str, Any]], None], options: Sequence[Option]) -> Any:
    """The command that calls `run` with what was given, as typer makes it."""
    def call(**values: Any) -> None:
        run({name: value for name, value in values.items() if value is not None and value != []})

    parameters = [inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotated(option),
                                    default=inspect.Parameter.empty if option.required else None)
                  for option in options]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command(help=inspect.getdoc(run))(call)
    return typer.main.get_command(app)


def annotated(option: Option) -> Any:
    """The annotation that typer reads an option of a derived command from."""
    if option.argument:
        declared: Any = typer.Argument(metavar=option.argument, help=escaped(option.text), show_default=False)
    else:
        flags = option.flags or (f"--{option.name.replace('_', '-')}",)
        declared = typer.Option(*flags, help=escaped(option.text), show_default=False)
    return Annotated[option.type if option.required else option.type | None, declared]


def described(
    help: str, *flags: str, default: object = "", choices: Sequence[object] = (), least: int | None = None, **more: Any
) -> Any:
    """What typer reads an option of an ordinary command from: the same words in the same order.

    `least` is checked by typer, and `more` is what else it takes (parser, metavar). tests/test_help.py compares
    `default` with the parameter's.
    """
    text = Option("", str, help, default, choices=tuple(choices), least=least).text
    return typer.Option(*flags, help=escaped(text), show_default=False, min=least, **more)


def escaped(text: str) -> str:
    """Typer takes [brackets] for markup."""
    return text.replace("[", "\\[")
