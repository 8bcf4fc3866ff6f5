"""`python -m tests.structure [FOLDER]` prints folders with their files and arrows, and what breaks the tree's rules.

`--counts [--at COMMIT]` prints the counts of `tests.structure.counts` instead, of the working tree and of a commit.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from tests.structure.arrows import ROOT, back_arrows, circles, files_in, floors, folders, import_graph, inside
from tests.structure.counts import counts


def main(arguments: list[str]) -> int:
    """0 if the tree keeps its rules."""
    if "--counts" in arguments:
        return print_counts(arguments[arguments.index("--at") + 1] if "--at" in arguments else None)
    graph = import_graph()
    wanted = [name.strip("/").replace("/", ".") for name in arguments] or folders(graph)
    counts = files_in()
    for folder in wanted:
        arrows = inside(folder, graph)
        print(f"{folder}  ({counts.get(folder.replace('.', '/'), 0)} modules)")
        heights = {} if circles(arrows) else floors(arrows)
        for child in sorted(arrows, key=lambda name: (-heights.get(name, 0), name)):
            below = ", ".join(sorted(name.rpartition(".")[2] for name in arrows[child])) or "-"
            print(f"  {heights.get(child, '?'):>2}  {child.rpartition('.')[2]:28} -> {below}")
    rounds, back = circles(graph), back_arrows(graph)
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} arrows, {len(rounds)} circles, "
          f"{len(back)} folders with arrows back up")
    for group in (*rounds, *(group for groups in back.values() for group in groups)):
        print("  circle:", " <-> ".join(group))
    return 1 if rounds or back else 0


def print_counts(commit: str | None) -> int:
    """A table in Markdown: a line a count, a column for the commit and one for the working tree."""
    columns = {"working tree": counts()}
    if commit is not None:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
            with tarfile.open(fileobj=BytesIO(archive)) as tree:
                tree.extractall(folder, filter="data")
            columns = {commit: counts(Path(folder)), **columns}
    print("| count |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in columns["working tree"]:
        print(f"| {name} |", " | ".join(column[name] for column in columns.values()), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
