"""Which public functions take or return arrays, and whether their docstrings state shape, dtype and what is counted.

A function counts when a parameter, the result or (of a dataclass) a field is annotated with an array, a container of
arrays or an alias of either; callbacks do not. Its documentation is its own docstring, that of the method it overrides,
and what its class, a base or its module says in a sentence that begins "Every array".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.structure.arrows import ROOT, modules

ARRAYS = {"ndarray", "NDArray", "Tensor", "TensorProtocol", "TensorProto", "ArrayLike"}
# Torch's and ONNX's namesakes of theirs; other modules' `Tensor` counts as one too.
SKIPPED = {"Callable", "Literal"}

# One length of an axis: 4, B, H/8, 2 * steps, height', ... ; words with spaces between them are prose in brackets.
_LENGTH = r"(?:\.\.\.|\d+[A-Z]?|len\(\w+\)|[A-Za-z_][\w.']*)"
_AXIS = rf"[-*]?{_LENGTH}(?: ?[*/+|-] ?{_LENGTH})*"
SHAPE = re.compile(
    rf"(?<!\w)\((?:\)|{_AXIS},(?: ?{_AXIS},)*(?: ?{_AXIS})?\))|\bscalars?\b|\b(?:one|two|three|four)-dimensional\b"
    r"|\b(?:any|same|own|its|their|whatever|declared|whose|every|original) shapes?\b"
    r"|\bshapes? (?:of|and dtypes?)\b|\bdtypes? and shapes?\b"
)
DTYPE = re.compile(r"\b(?:b?float(?:16|32|64)|u?int(?:4|8|16|32|64)|float8\w*|bool|dtypes?)\b")
# What the numbers are: a unit, a range, or the quantity whose unit is its own.
UNIT = re.compile(
    r"\b(?:latents?|pixels?|seconds?|bytes?|decibels?|dB|degrees|unit variance|standard.normal|noise levels?|sigmas?"
    r"|lambda|timesteps?|token ids?|embeddings?|embedded|hidden states?|features?|logits?|probabilit(?:y|ies)|weights?"
    r"|biases|activations?|gradients?|scales?|zero points?|indices|mask|betas?|variances?|deviations?|shares?"
    r"|quantiles?|coefficients?|scores?|similarit(?:y|ies)|codes|percent|norms?|magnitudes?|distances?|errors?"
    r"|model outputs?|predictions?|0 to 1|-1 to 1|0 to 255|TensorSpecs?|True (?:where|for)|any values?|any quantity)\b",
    re.IGNORECASE,
)
_EVERY = re.compile(r"Every array\b[^\n]*(?:\n(?!\s*\n)[^\n]*)*")
_CHECKS = (("shape", SHAPE), ("dtype", DTYPE), ("unit", UNIT))


@dataclass(frozen=True)
class Finding:
    """A public function that takes or returns arrays, and what its documentation leaves unsaid."""

    module: str
    name: str
    line: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.name}: no {', '.join(self.missing)}"


@dataclass(frozen=True)
class _Module:
    """One file's names: what it imports, what it assigns, its classes."""

    name: str
    tree: ast.Module
    imports: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def aliases(self) -> dict[str, ast.expr]:
        """Name -> expression of module-level assignments, annotated or not."""
        found: dict[str, ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = node.value
        return found

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Top-level classes by name."""
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}


def array_docstrings(root: Path = ROOT) -> list[Finding]:
    """Every public function that takes or returns arrays; `missing` is empty where its documentation says all."""
    tree = _Tree(root)
    return [finding for module in tree.modules.values() for finding in tree.findings(module)]


class _Tree:
    """The packages' modules, with what is needed to follow a name from one to another."""

    def __init__(self, root: Path) -> None:
        self.modules = {name: _read(name, file) for name, file in modules(root).items()}

    def findings(self, module: _Module) -> Iterator[Finding]:
        """The functions of one module, methods and dataclasses included."""
        about = _every(ast.get_docstring(module.tree))
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                if self._takes_arrays(module, node):
                    yield _finding(module, node.name, node.lineno, f"{ast.get_docstring(node)}\n{about}")
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from self._of_class(module, node, about)

    def _of_class(self, module: _Module, cls: ast.ClassDef, about: str) -> Iterator[Finding]:
        if any(isinstance(node, ast.AnnAssign) and self._is_array(module, node.annotation) for node in cls.body):
            yield _finding(module, cls.name, cls.lineno, f"{ast.get_docstring(cls)}\n{_of_fields(cls)}\n{about}")
        for node in cls.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not self._takes_arrays(module, node):
                continue
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            said = self._documentation(module, cls, node.name)
            if node.name == "__init__":
                said += f"\n{ast.get_docstring(cls)}"
            yield _finding(module, f"{cls.name}.{node.name}", node.lineno, f"{said}\n{about}")

    def _documentation(self, module: _Module, cls: ast.ClassDef, method: str) -> str:
        """What a class and its bases say of a method, and of every array."""
        own = [ast.get_docstring(node) or "" for node in cls.body
               if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method]
        said = [*own, _every(ast.get_docstring(cls))]
        for base in cls.bases:
            found = self._class(module, base.value if isinstance(base, ast.Subscript) else base)
            if found is not None:
                said.append(self._documentation(*found, method))
        return "\n".join(said)

    def _class(self, module: _Module, base: ast.expr) -> tuple[_Module, ast.ClassDef] | None:
        if not isinstance(base, ast.Name):
            return None
        if base.id in module.classes:
            return module, module.classes[base.id]
        source, name = module.imports.get(base.id, ("", ""))
        other = self.modules.get(source)
        return (other, other.classes[name]) if other is not None and name in other.classes else None

    def _takes_arrays(self, module: _Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        wanted = [argument.annotation for argument in given if argument is not None] + [node.returns]
        return any(self._is_array(module, annotation) for annotation in wanted if annotation is not None)

    def _is_array(self, module: _Module, annotation: ast.expr, seen: tuple[str, ...] = ()) -> bool:
        """Whether an annotation names an array anywhere outside of a callback."""
        if isinstance(annotation, ast.Constant):
            return isinstance(annotation.value, str) and self._is_array(module, _parsed(annotation.value), seen)
        if isinstance(annotation, ast.Subscript) and _last_name(annotation.value) in SKIPPED:
            return False
        if isinstance(annotation, ast.Subscript) and _last_name(annotation.value) == "Annotated":
            annotation = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
        if isinstance(annotation, ast.Attribute):
            return annotation.attr in ARRAYS
        if isinstance(annotation, ast.Name):
            return annotation.id in ARRAYS or self._alias_is_array(module, annotation.id, seen)
        if not isinstance(annotation, ast.Subscript | ast.BinOp | ast.Tuple | ast.List):
            return False  # a module's constant that is no alias of a type
        return any(self._is_array(module, child, seen) for child in ast.iter_child_nodes(annotation)
                   if isinstance(child, ast.expr))

    def _alias_is_array(self, module: _Module, name: str, seen: tuple[str, ...]) -> bool:
        if f"{module.name}.{name}" in seen:
            return False
        if name in module.aliases:
            return self._is_array(module, module.aliases[name], (*seen, f"{module.name}.{name}"))
        source, original = module.imports.get(name, ("", ""))
        other = self.modules.get(source)
        return other is not None and self._alias_is_array(other, original, seen)


def _read(name: str, file: Path) -> _Module:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = {alias.asname or alias.name: (node.module, alias.name) for node in ast.walk(tree)
               if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}
    return _Module(name, tree, imports)


def _finding(module: _Module, name: str, line: int, said: str) -> Finding:
    missing = tuple(label for label, pattern in _CHECKS if not pattern.search(said))
    return Finding(module.name, name, line, missing)


def _of_fields(cls: ast.ClassDef) -> str:
    """What a dataclass says of its fields where it declares them, for help texts and the like."""
    values = [node.value for node in cls.body if isinstance(node, ast.AnnAssign) and node.value is not None]
    return "\n".join(node.value for value in values for node in ast.walk(value)
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _every(docstring: str | None) -> str:
    """The sentences, to the end of their paragraph, that speak of every array."""
    return "\n".join(_EVERY.findall(docstring or ""))


def _parsed(annotation: str) -> ast.expr:
    try:
        return ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return ast.Constant(None)  # a string that is no annotation


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
