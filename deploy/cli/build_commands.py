"""`build` and `prune`: their options are the fields of `BuildSpec`, written as the command line writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cli.derived_options import Option, command_line_type
from runtimes.errors import InputError

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

# Fields that have no option of their own: `--shapes` and `--prune` fill them when several are given.
WITHOUT_OPTION = ("profiles", "prune_candidates")
# Fields of another type on the command line.
WRITTEN_AS: Mapping[str, Any] = {"shapes": list[str], "budget": list[str], "engine": list[str], "prune": str,
                                 "prompts": Path, "calibration_prompts": Path, "recover_prompts": Path}
OF_EVERY_PRUNING = ("model", "variant", "revision", "budget", "verify")  # what `prune` takes besides the prunings' own
NO_VERIFY = Option("no_verify", bool, "compare nothing, as --verify no", default=False)


def build_options() -> list[Option]:
    """Every field of a spec, those of pruning last, and what concerns the command alone."""
    from deploy.core.pruning_options import PruningOptions
    from deploy.core.spec import BuildSpec

    pruning = list(PruningOptions.model_fields)
    return [
        *options_of([name for name in BuildSpec.model_fields if name not in pruning] + pruning), NO_VERIFY,
        Option("spec", Path, "YAML file with these options as keys, _ for -; options given here win", default=None),
        Option("dry_run", bool, "print the passes that would run, and do nothing", default=False),
        Option("output", Path, "folder of the bundle", "build/MODEL-TARGET-PRECISION", flags=("-o", "--output")),
    ]


def prune_options() -> list[Option]:
    """The fields that matter to a pruned folder."""
    from deploy.core.pruning_options import PruningOptions

    return [*options_of([*OF_EVERY_PRUNING, *PruningOptions.model_fields]), NO_VERIFY,
            Option("output", Path, "folder to write, in diffusers layout", "pruned", flags=("-o", "--output"))]


def options_of(names: Iterable[str]) -> list[Option]:
    """The options of fields of `BuildSpec`: description, default, range and choices are the field's."""
    from deploy.core.spec import BuildSpec

    options = []
    for name in names:
        if name in WITHOUT_OPTION:
            continue
        field = BuildSpec.model_fields[name]
        kind, choices = (WRITTEN_AS[name], ()) if name in WRITTEN_AS else command_line_type(field.annotation)
        bounds = {ours: getattr(bound, theirs) for bound in field.metadata for theirs, ours in
                  (("ge", "least"), ("gt", "above"), ("le", "most"), ("lt", "below")) if hasattr(bound, theirs)}
        default = (field.json_schema_extra or {}).get("default_text", field.default or None)  # type: ignore[union-attr]
        if kind in (bool, int, float):
            default = field.default
        options.append(Option(name, kind, field.description or "", default, choices=choices, **bounds,
                              argument="MODEL" if name == "model" else ""))
    return options


def spec_of(given: Mapping[str, Any], file: Path | None = None) -> BuildSpec:
    """The spec for what was given on the command line.

    Raises:
        InputError: what cannot be read, does not fit together, or is given twice.
    """
    from calibration.trajectory.prompts import read_prompts
    from deploy.core.pruning_options import parse_shares
    from deploy.core.spec import make_spec, parse_budget, parse_engine, read_shapes

    read: dict[str, Callable[[Any], Any]] = {
        "budget": parse_budget, "engine": parse_engine, "prompts": read_prompts, "calibration_prompts": read_prompts,
        "recover_prompts": read_prompts}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name == "shapes":
            fields |= read_shapes(value)
        elif name == "prune":
            fields |= parse_shares(value)
        elif name == "no_verify":
            if "verify" in given:
                raise InputError("both --verify and --no-verify are given", where="build", fix="give one of them")
            fields["verify"] = "no"
        else:
            fields[name] = read[name](value) if name in read else tuple(value) if isinstance(value, list) else value
    return make_spec(fields, file)


def build(given: dict[str, Any]) -> None:
    """Build a bundle: load, export, optimize, and prove it equal to PyTorch."""
    from deploy.building.run_build import plan_build, run_build
    from deploy.cli import console

    output, dry_run, file = (given.pop(name, None) for name in ("output", "dry_run", "spec"))
    spec = spec_of(given, file)
    if dry_run:
        console.show_plan(plan_build(spec), spec, output)
        return
    with console.shown_progress():
        outcome = run_build(spec, output)
    console.show_outcome(outcome)


def prune(given: dict[str, Any]) -> None:
    """Write a smaller model as a diffusers folder."""
    from deploy.building.prune_folder import prune_folder
    from deploy.cli import console

    output = given.pop("output", Path("pruned"))
    with console.shown_progress():
        components = prune_folder(spec_of(given), output)
    console.show_pruned(components, output)
