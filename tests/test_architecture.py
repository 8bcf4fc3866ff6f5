"""The rules of the tree that no type checker sees: direction of imports, what loads when, size, docstrings, pins.

`python -m tests.structure` prints what the tests about folders, arrows and names compute, `--counts` the figures.
"""

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

from tests.structure.arrows import (
    MOST_FILES,
    TABLES,
    Graph,
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

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deploy", "exporters", "calibration", "runtimes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
# A file that holds one thing is shorter than this; over it, it asks to be split.
MOST_LINES = 400
# Of a function, its docstring included: 95 of 100 are shorter than the first, all than the second.
MOST_FUNCTION_LINES = (30, 60)
# Of a function, commands among them: who needs more asks for a `Request` or options of its own.
MOST_ARGUMENTS = 10


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


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Who imports whom, read once."""
    return import_graph()


@pytest.fixture(scope="module")
def every_function() -> list[Function]:
    """Every function of the packages, read once."""
    return functions()


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
        ("runtimes/pipeline", "import pydantic", "server-apart"),
        ("runtimes/system", "def f():\n    import runtimes.serving.engine.engine", "server-apart"),
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


def test_no_circle_between_modules(graph):
    assert circles(graph) == []


def test_every_folder_has_an_order_in_which_all_arrows_point_down(graph):
    assert back_arrows(graph) == {}


def test_no_folder_is_crowded():
    assert {folder: n for folder, n in files_in().items() if n > MOST_FILES and folder not in TABLES} == {}


def test_no_two_modules_have_names_that_are_mistaken_for_each_other():
    assert look_alikes(named_files()) == []


def arrows_between_passes(graph: Graph) -> set[tuple[str, str]]:
    prefix = "deploy.passes."
    return {(module.removeprefix(prefix), other.removeprefix(prefix))
            for module, others in graph.items() if module.startswith(prefix)
            for other in others if other.startswith(prefix)}


def test_passes_do_not_import_each_other(graph):
    assert arrows_between_passes(graph) == set()


def spoil(tree: Path, module: str, code: str) -> None:
    file = tree.joinpath(*module.split(".")).with_suffix(".py")
    file.write_text(file.read_text() + code if file.is_file() else code)


def test_a_circle_is_found_even_if_one_import_is_inside_a_function(tree_copy):
    spoil(tree_copy, "runtimes.system.one", "import runtimes.system.two\n")
    spoil(tree_copy, "runtimes.system.two", "def f():\n    from runtimes.system import one\n")
    assert circles(import_graph(tree_copy)) == [["runtimes.system.one", "runtimes.system.two"]]


def test_an_arrow_back_up_between_folders_is_found_without_a_circle_of_modules(tree_copy):
    """text -> adapters -> backends by other modules than the ones that close the ring."""
    spoil(tree_copy, "runtimes.backends.against", "from runtimes.text import prompt_cache\n")
    graph = import_graph(tree_copy)
    assert circles(graph) == []
    assert back_arrows(graph, tree_copy) == {"runtimes": [["runtimes.backends", "runtimes.text"]]}


def test_a_crowded_folder_and_a_look_alike_are_found(tree_copy):
    for number in range(MOST_FILES):
        spoil(tree_copy, f"calibration.choice.crowd{number}", "")
    spoil(tree_copy, "exporters.adapters.merged_lora", "")
    spoil(tree_copy, "exporters.adapters.merging_lora", "")
    spoil(tree_copy, "exporters.adapters.prompts", "")
    assert [f for f, n in files_in(tree_copy).items() if n > MOST_FILES and f not in TABLES] == ["calibration/choice"]
    assert look_alikes(named_files(tree_copy)) == [("calibration.trajectory.prompts", "exporters.adapters.prompts")]
    spoil(tree_copy, "exporters.adapters.prompting", "")
    assert len(look_alikes(named_files(tree_copy))) == 2


def test_an_import_between_passes_is_found(tree_copy):
    spoil(tree_copy, "deploy.passes.load", "from deploy.passes import export\n")
    assert arrows_between_passes(import_graph(tree_copy)) == {("load", "export")}


def test_functions_are_short(every_function):
    usual, most = MOST_FUNCTION_LINES
    assert p95([function.lines for function in every_function]) <= usual
    assert {f"{f.module}.{f.name}" for f in every_function if f.lines > most} == set()


def test_no_function_takes_many_arguments(every_function):
    too_many = [f"{f.module}.{f.name}" for f in every_function if f.arguments > MOST_ARGUMENTS]
    assert too_many == []


def test_networks_are_asked_for_by_role():
    assert unet_literals() == []


def test_a_long_function_a_wide_signature_and_a_literal_unet_are_found(tree_copy):
    wide = ", ".join(f"a{number}" for number in range(MOST_ARGUMENTS + 1))
    spoil(tree_copy, "deploy.core.spoiled", f'def wide({wide}):\n    """Not a "unet" line."""\n' + "    1\n" * 99
          + '    return f"unet: {a1}"\n')
    found = next(f for f in functions(tree_copy) if f.name == "wide")
    assert (found.lines, found.code_lines, found.arguments) == (102, 101, MOST_ARGUMENTS + 1)
    assert [line for line in unet_literals(tree_copy) if "spoiled" in line] == ["deploy.core.spoiled:102"]


def test_functions_of_arrays_state_shape_dtype_and_what_the_numbers_are():
    assert [str(finding) for finding in array_docstrings() if finding.missing] == []


ARRAY_CODE = '''"""A module."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
import numpy as np
from numpy.typing import NDArray
from runtimes.schedulers.noise_levels import Float32
Feeds = Mapping[str, "Float32 | None"]
{code}
'''


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ('def f(x: Float32) -> int:\n    """(B, 4, H/8, W/8) float32, unit variance."""', ()),
        ('def f() -> list[NDArray[np.int64]]:\n    """Token ids (prompts, 77), int64."""', ()),
        ('def f(x: Feeds) -> int:\n    """(n,) latents."""', ("dtype",)),
        ('def f(x: "np.ndarray") -> int:\n    """float32 pixels (Ho et al., arXiv 2207.12598)."""', ("shape",)),
        ('def f(x: Float32) -> int:\n    """It calls f() with a float32 (H, W)."""', ("unit",)),
        ('def f(x: Float32) -> int:\n    """Nothing."""', ("shape", "dtype", "unit")),
        ('@dataclass\nclass f:\n    """Nothing."""\n    x: Float32', ("shape", "dtype", "unit")),
        ('class f:\n    """Every array is (n,) float32 pixels."""\n    def g(self, x: Float32):\n        """X."""', ()),
        ('class f:\n    """Holds (n,) float32 pixels."""\n    def g(self, x: Float32):\n        """X."""',
         ("shape", "dtype", "unit")),
        ('class f:\n    """Of (n,) float32 pixels."""\n    def __init__(self, x: Float32):\n        pass', ()),
        ('class _F:\n    def f(self, x: Float32):\n        """(n,) float32 pixels."""\n'
         'class f(_F):\n    """A class."""\n    def f(self, x: Float32):\n        """X."""', ()),
        ('def f(x: Callable[[Float32], Float32]) -> int:\n    """A callback."""', None),
        ('A = Annotated[Float32, "no type"]\ndef f(x: A) -> int:\n    """Nothing."""', ("shape", "dtype", "unit")),
        ('A = Annotated[int, Float32, "no type"]\ndef f(x: A) -> int:\n    """A number."""', None),
        ('def _f(x: Float32) -> int:\n    """Private."""', None),
    ],
)
def test_what_a_docstring_of_arrays_must_say(tmp_path, code, missing):
    (tmp_path / "runtimes" / "schedulers").mkdir(parents=True)
    (tmp_path / "runtimes" / "one.py").write_text(ARRAY_CODE.format(code=code))
    (tmp_path / "runtimes" / "schedulers" / "noise_levels.py").write_text("Float32 = NDArray[np.float32]\n")
    assert [finding.missing for finding in array_docstrings(tmp_path)] == ([] if missing is None else [missing])


def test_names_and_sentences_use_the_words_of_the_field():
    assert banned_words() == []


def test_a_banned_word_is_found_in_names_comments_docstrings_and_messages_but_not_in_keys(tree_copy):
    (tree_copy / "runtimes" / "words.py").write_text(
        '"""A picture of it."""\nKEY = "pictures"\n\n\n# told so\nclass KeptOnes:\n'
        '    drawn_by = f"a {KEY} was drawn"\n    tolder = "files are kept"\n')
    found = [word for word in banned_words(tree_copy) if word.startswith("runtimes.words:")]
    assert [word.removeprefix("runtimes.words:") for word in found] == [
        "1 picture", "5 told", "6 KeptOnes", "7 drawn_by", "7 drawn"]


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
