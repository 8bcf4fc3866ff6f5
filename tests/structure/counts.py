"""The counts of the tree that are to be small: files a folder, circles, arrows back up, long functions and the like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.structure.arrows import (
    MOST_FILES,
    ROOT,
    TABLES,
    back_arrows,
    circles,
    files_in,
    import_graph,
    look_alikes,
    named_files,
)
from tests.structure.docstrings import array_docstrings
from tests.structure.functions import Function, functions, p95, unet_literals
from tests.structure.words import banned_words


def counts(root: Path = ROOT) -> dict[str, str]:
    """What is counted -> the figure in words, for any tree whose packages have the names of today."""
    return {name: figure for part in (_folders(root), _arrows(root), _functions(root), _literals(root))
            for name, figure in part}


def _folders(root: Path) -> Iterator[tuple[str, str]]:
    files = {folder: count for folder, count in files_in(root).items() if folder not in TABLES}
    fullest = sorted(files, key=lambda folder: -files[folder])[:5]
    crowded = sum(count > MOST_FILES for count in files.values())
    yield "modules", str(sum(files_in(root).values()))
    yield "folders with modules", str(sum(count > 0 for count in files_in(root).values()))
    yield "fullest folders, tables apart", ", ".join(f"{folder} {files[folder]}" for folder in fullest)
    yield f"folders of more than {MOST_FILES}, tables apart", str(crowded)


def _arrows(root: Path) -> Iterator[tuple[str, str]]:
    graph = import_graph(root)
    rounds = circles(graph)
    yield "arrows", str(sum(map(len, graph.values())))
    yield "circles (modules in them)", f"{len(rounds)} ({sum(map(len, rounds))})"
    yield "folders with arrows back up", str(len(back_arrows(graph, root)))
    yield "look-alike names, passes apart", str(len(look_alikes(named_files(root))))


def _functions(root: Path) -> Iterator[tuple[str, str]]:
    found = functions(root)
    yield "functions", str(len(found))
    yield "function lines p95, max", f"{p95([f.lines for f in found])}, {_longest(found)}"
    yield "the same without docstrings", f"{p95([f.code_lines for f in found])}, {max(f.code_lines for f in found)}"
    for label, group in (("longest signature, commands apart", [f for f in found if not f.is_command]),
                         ("longest command", [f for f in found if f.is_command])):
        widest = max(group, key=lambda f: f.arguments, default=None)
        yield label, "-" if widest is None else f"{widest.arguments} ({widest.module}.{widest.name})"


def _longest(found: list[Function]) -> str:
    longest = max(found, key=lambda function: function.lines)
    return f"{longest.lines} ({longest.module}.{longest.name})"


def _literals(root: Path) -> Iterator[tuple[str, str]]:
    lines = unet_literals(root)
    places = array_docstrings(root)
    said = sum(not place.missing for place in places)
    yield 'lines with a literal "unet" that is not another\'s word', f"{len(lines)} in {_modules(lines)} modules"
    yield "array docstrings with shape, dtype and unit", f"{said} of {len(places)} ({100 * said / len(places):.0f} %)"
    yield "words that the field does not use", str(len(banned_words(root)))


def _modules(lines: list[str]) -> int:
    return len({line.partition(":")[0] for line in lines})
