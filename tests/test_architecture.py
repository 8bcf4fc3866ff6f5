"""The rules of the tree that no type checker sees: direction of imports, what loads when, size, docstrings, pins."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deploy", "exporters", "calibration", "runtimes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
# A file that holds one thing is shorter than this; over it, it asks to be split.
MOST_LINES = 400


def python_files(*folders: str) -> list[Path]:
    # deploy/templates holds files that are written into other folders, not code of the package.
    found = (f for folder in folders for f in (ROOT / folder).rglob("*.py"))
    return sorted(f for f in found if "templates" not in f.parts)


def as_module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.fixture
def tree_copy(tmp_path: Path) -> Path:
    """The Python files of the four packages and the contracts, in a folder that a test may spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file in python_files(*PACKAGES):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_there(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert package in PYPROJECT["tool"]["importlinter"]["root_packages"]
    assert package in PYPROJECT["tool"]["mypy"]["packages"]


def test_every_folder_with_code_is_a_package():
    """Without __init__.py a folder is left out of the wheel silently, and two tests of one name hide each other."""
    folders = {file.parent for file in python_files(*PACKAGES, "tests")}
    assert [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_imports_go_one_way():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "code", "broken"),
    [
        ("runtimes", "import exporters", "layers"),
        ("runtimes", "def f():\n    import deploy", "layers torch-free"),
        ("exporters", "import deploy", "layers"),
        ("calibration", "from exporters import anything", "layers"),
        ("exporters", "import calibration", "layers"),
        ("runtimes", "def f():\n    import torch", "torch-free"),
        ("runtimes", "from diffusers.schedulers import DDIMScheduler", "torch-free"),
        ("runtimes", "import transformers", "torch-free"),
        ("runtimes", "import pydantic", "torch-free"),
    ],
)
def test_an_import_against_the_arrows_is_refused(tree_copy, package, code, broken):
    (tree_copy / package / "against_the_arrows.py").write_text(code + "\n")
    result = lint_imports(tree_copy)
    names = {c["id"]: c["name"] for c in PYPROJECT["tool"]["importlinter"]["contracts"]}
    # import-linter wraps the names it prints at the width of the terminal
    printed = " ".join(result.stdout.split())
    assert result.returncode == 1, result.stdout + result.stderr
    assert all(f"{names.pop(contract)} BROKEN" in printed for contract in broken.split())
    assert all(f"{other} KEPT" in printed for other in names.values())


def test_runtimes_reach_torch_by_no_detour(tree_copy):
    """The contract holds along a chain of imports too: the layers alone would say nothing of a helper inside."""
    (tree_copy / "runtimes" / "near.py").write_text("import runtimes.far\n")
    (tree_copy / "runtimes" / "far.py").write_text("import torch\n")
    result = lint_imports(tree_copy)
    assert result.returncode == 1
    assert "runtimes.far -> torch" in " ".join(result.stdout.split())


def light_modules() -> list[str]:
    """What a command imports before it knows what it is asked for; `reference` is the one torch Session."""
    files = [*(ROOT / "deploy").glob("*.py"), *(ROOT / "deploy" / "passes").rglob("*.py")]
    return sorted(as_module(f) for f in files if f.stem not in ("reference", "__main__"))


@pytest.mark.parametrize("module", light_modules())
def test_no_heavy_library_is_loaded_at_import(module, run_python):
    code = (
        "import importlib, sys\n"
        "module, *heavy = sys.argv[1:]\n"
        "importlib.import_module(module)\n"
        "print(*sorted(set(heavy) & set(sys.modules)))"
    )
    assert run_python(code, module, *HEAVY).split() == []


@pytest.mark.parametrize("file", python_files(*PACKAGES, "tests"), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_opens_with_its_purpose_and_holds_one_thing(file):
    source = file.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "no docstring"
    assert source.count("\n") <= MOST_LINES, "split it, or say in CONTRIBUTING's decisions why not"


def test_every_requirement_has_its_one_exact_release():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = [canonicalize_name(r.name) for r in pinned]
    assert len(names) == len(set(names))
    exact = {name: next(iter(r.specifier)) for name, r in zip(names, pinned, strict=True)}
    assert {s.operator for s in exact.values()} == {"=="}

    project = PYPROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        version = exact[canonicalize_name(requirement.name)].version
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, pinned {version}"
