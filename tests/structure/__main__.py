"""`python -m tests.structure [FOLDER]`: folders with their files and arrows, and what breaks the rules of the tree."""

from __future__ import annotations

import sys

from tests.structure.arrows import back_arrows, circles, files_in, floors, folders, import_graph, inside


def main(arguments: list[str]) -> int:
    """0 if the tree keeps its rules."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
