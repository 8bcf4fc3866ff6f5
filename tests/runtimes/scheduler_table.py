"""Writes the table of docs/schedulers.md: `python -m tests.runtimes.scheduler_table --write`; prints it without."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import diffusers
import torch

from runtimes.errors import InputError
from runtimes.schedulers import CLASS_NAMES
from tests.runtimes.scheduler_reference import (
    KNOWN_FAULTS,
    SCHEDULERS,
    SIGMAS,
    ReferenceNotFinite,
    cell_config,
    cells,
    compare,
    correct_rounding,
    keys_of,
)

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
BEGIN, END = "<!-- table: python -m tests.runtimes.scheduler_table --write -->", "<!-- end of table -->"
RUNS = ((1, 1.0), (7, 0.6), (20, 1.0), (25, 0.6), (50, 1.0))


def worst(name: str, prediction: str, spacing: str, spread: str) -> float:
    """The worst relative L2 of a step, over the runs and, where the method has them, its orders 1 to 3."""
    found = 0.0
    for order in (1, 2, 3) if "solver_order" in keys_of(name) else (None,):
        options = {} if order is None else {"solver_order": order}
        for steps, strength in RUNS:
            config = cell_config(name, prediction, spacing, spread, **options)
            try:
                found = max(found, compare(config, steps, strength, tolerance=float("inf")))
            except (InputError, ReferenceNotFinite) as error:
                raise SystemExit(f"{config}: {error}") from error
    return found


def rows(name: str) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
    """Prediction, spacing, and for each choice of sigmas the figure as torch rounds and with its rounding corrected."""
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for prediction, spacing, spread in cells(name):
        figures = []
        for context in (nullcontext(), correct_rounding()):
            with context:
                figures.append(worst(name, prediction, spacing, spread))
        found.setdefault((prediction, spacing), {})[spread] = (figures[0], figures[1])
    for (prediction, spacing), figures_by_spread in found.items():
        yield prediction, spacing, figures_by_spread


def table() -> list[str]:
    """The lines of the table, and of a summary before it."""
    classes = {name: cls for cls, name in CLASS_NAMES.items()}
    head = ["method", "prediction", "spacing", *SIGMAS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    summary = ["| method | diffusers' class | worst, as torch rounds here | worst, torch rounding correctly |",
               "|---|---|---|---|"]
    for name in SCHEDULERS:
        plain, corrected = 0.0, 0.0
        for prediction, spacing, figures in rows(name):
            plain = max(plain, *(figure for figure, _ in figures.values()))
            corrected = max(corrected, *(figure for _, figure in figures.values()))
            shown = [f"{figures[spread][0]:.0e}" if spread in figures else "" for spread in SIGMAS]
            lines.append("| " + " | ".join([name, prediction, spacing, *shown]) + " |")
        summary.append(f"| {name} | {classes[name]} | {plain:.0e} | {corrected:.0e} |")
        print(summary[-1], flush=True)
    return [*summary, "", *lines]


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}, between its two marks")
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    faults = ["What diffusers does wrong, and what is done here:", "",
              *(f"- **{name}**: {text}" for name, text in KNOWN_FAULTS.items())]
    text = "\n".join([BEGIN, "", *table(), "", *faults, "", END])
    if not wanted.write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + text + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
