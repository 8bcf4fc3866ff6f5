"""How long the functions are, how many arguments they take, and where a network is called by a literal name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.structure.arrows import ROOT, modules

# Where a diffusers pipeline's own names are read and turned into roles, and where "unet" is another's word.
NAMES_NETWORKS = (
    "exporters.families", "exporters.source",
    "runtimes.adapters.lora_files",  # keys of LoRA files
    "deploy.bench.contest", "deploy.cli.bench_table",  # `unet_gflops` of `bench --json`
    "exporters.measure.fusion_speed",  # an option of onnxruntime.transformers
    "exporters.measure.hoisted", "exporters.measure.token_merging",  # the folder of the reference model's network
)
_UNET = re.compile(r"\bunet(_\w+)?\b")
AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One function or method.

    Attributes:
        lines: from `def` to its end, docstring included.
        code_lines: the same without the docstring.
        arguments: how many it takes, `self` and `cls` apart.
        is_command: whether it is a command of the command line, whose arguments are its options.
    """

    module: str
    name: str
    lines: int
    code_lines: int
    arguments: int
    is_command: bool


def functions(root: Path = ROOT) -> list[Function]:
    """Every function of the packages, nested ones too."""
    found = []
    for module, file in modules(root).items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, AnyFunction):
                found.append(_function(module, node))
    return found


def _function(module: str, node: AnyFunction) -> Function:
    lines = _lines(node)
    said = _lines(node.body[0]) if ast.get_docstring(node) is not None else 0
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = sum(argument.arg not in ("self", "cls") for argument in given)
    return Function(module, node.name, lines, lines - said, arguments, _is_command(node))


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _is_command(node: AnyFunction) -> bool:
    called = (decorator.func for decorator in node.decorator_list if isinstance(decorator, ast.Call))
    return any(isinstance(func, ast.Attribute) and func.attr == "command" for func in called)


def p95(numbers: Sequence[int]) -> int:
    """The smallest number that at least 95 of 100 do not exceed."""
    return sorted(numbers)[-(-95 * len(numbers) // 100) - 1]


def unet_literals(root: Path = ROOT) -> list[str]:
    """`module:line` of each line with the name "unet" in a string, docstrings apart, where roles are to be asked."""
    found = set()
    for module, file in modules(root).items():
        if not module.startswith(NAMES_NETWORKS):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found |= {(module, line) for line in _lines_naming(tree, _UNET)}
    return [f"{module}:{line}" for module, line in sorted(found)]


def _lines_naming(tree: ast.Module, name: re.Pattern[str]) -> Iterator[int]:
    said = set(_docstrings(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            if name.search(node.value):
                yield node.lineno


def _docstrings(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        # A string that is a statement: a docstring, or a note under a field.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield id(node.value)
