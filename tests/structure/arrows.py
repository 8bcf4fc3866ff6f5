"""Who imports whom in the four packages, read from the source: circles, arrows back up, crowded folders, look-alikes.

Imports inside functions and those for type checkers alone count like any other. The arrows from a package's
`__init__.py`, its public face, count as the package's own: nothing below may import it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtimes", "calibration", "exporters", "deploy")
# One entry a file: they may be long.
TABLES = ("runtimes/schedulers/methods", "exporters/families", "deploy/passes")
MOST_FILES = 14
Graph = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the packages by its dotted name; templates are files for other folders, not modules."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            if "templates" not in file.parts:
                found[".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of every import; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def import_graph(root: Path = ROOT) -> Graph:
    """Module -> modules of ours that it imports anywhere in its file."""
    known = modules(root)
    graph: dict[str, set[str]] = {module: set() for module in known}
    for module, file in known.items():
        for source, name in imported(ast.parse(file.read_text(encoding="utf-8"))):
            target = f"{source}.{name}" if f"{source}.{name}" in known else source
            if target in known and target != module:
                graph[module].add(target)
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def folders(graph: Iterable[str], root: Path = ROOT) -> list[str]:
    """Packages that hold modules, top ones first."""
    return sorted(module for module in graph if (root / module.replace(".", "/")).is_dir())


def inside(folder: str, graph: Graph) -> Graph:
    """The arrows between what lies directly in a folder: its modules, its subfolders as wholes, and its `__init__`."""
    def child(module: str) -> str | None:
        if module == folder:
            return folder
        return ".".join(module.split(".")[:folder.count(".") + 2]) if module.startswith(f"{folder}.") else None

    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        if (start := child(module)) is not None:
            arrows[start] |= {end for other in others if (end := child(other)) is not None and end != start}
    return arrows


def back_arrows(graph: Graph, root: Path = ROOT) -> dict[str, list[list[str]]]:
    """Folder -> groups of its children that depend on each other, so that no order has every arrow point down."""
    found = {folder: circles(inside(folder, graph)) for folder in folders(graph, root)}
    return {folder: groups for folder, groups in found.items() if groups}


def floors(graph: Graph) -> dict[str, int]:
    """Node -> length of the longest chain of imports below it. The graph must hold no circle."""
    heights: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in heights:
            heights[node] = max((height(other) + 1 for other in graph.get(node, ())), default=0)
        return heights[node]

    for node in graph:
        height(node)
    return heights


def files_in(root: Path = ROOT) -> dict[str, int]:
    """Folder -> number of modules in it, `__init__` and `__main__` apart."""
    counts: dict[str, int] = {}
    for file in modules(root).values():
        folder = file.parent.relative_to(root).as_posix()
        counts[folder] = counts.get(folder, 0) + (file.stem not in ("__init__", "__main__"))
    return counts


def named_files(root: Path = ROOT) -> list[str]:
    """Modules that are files and have a name of their own choice: the passes are named after what they do to users."""
    return [name for name, file in modules(root).items()
            if file.stem not in ("__init__", "__main__") and not name.startswith("deploy.passes.")]


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of modules of one name, or of names that differ by an ending of one or two words' forms only."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stems[_stem(name.rpartition(".")[2])].append(name)
    return [(group[0], other) for group in stems.values() for other in group[1:]]


def _stem(word: str) -> str:
    """A name without the ending that makes another form of the same word."""
    for ending in ("ations", "ation", "ings", "ing", "ers", "ors", "er", "or", "osis", "ose", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[:-len(ending)]
    return word
