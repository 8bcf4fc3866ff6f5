"""A base installation runs bundles: no torch, no diffusers, nothing that only [build] brings.

Twice: with every other distribution of this environment made unimportable (fast), and in new virtual environments
that hold the wheel and its base dependencies, at the pinned releases and at the floors (slow).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deploy", "exporters", "calibration", "runtimes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = PROJECT["dependencies"]
BUILD = PROJECT["optional-dependencies"]["build"]
# Backends with extras of their own: a session module of theirs may fail to import where they are absent.
BACKENDS = ("cuda", "openvino", "tensorrt", "tensorrt_rtx")
# What [serve] and [ray] bring, which only modules of the server may ask for.
SERVER = ("fastapi", "prometheus_client", "pydantic", "pydantic_core", "ray", "starlette", "uvicorn")
MOST_SECONDS_TO_IMPORT_RUNTIMES = 0.4

# Run first in a child process: from here on, only what sys.argv[1] names can be imported, besides ourselves and
# the standard library.
ONLY_BASE = """
import sys

class OnlyBase:
    allowed = set(sys.argv.pop(1).split(",")) | sys.stdlib_module_names

    def find_spec(self, name, path=None, target=None):
        # the standard library's own build settings have a name of their own on each platform
        if name.partition(".")[0] not in self.allowed and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {name!r} in a base installation", name=name)

sys.meta_path.insert(0, OnlyBase())
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import runtimes

for module in pkgutil.walk_packages(runtimes.__path__, "runtimes."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        absent = missing.name.partition(".")[0]
        if not (module.name.startswith("runtimes.backends.") and absent in BACKENDS) and not (
                module.name.startswith(("runtimes.serving.http.", "runtimes.serving.cluster.")) and absent in SERVER):
            raise
    print(module.name)
"""

COMMAND_LINE = """
import resource
from deploy.cli.commands import main

try:
    main()
except SystemExit as end:
    assert not end.code, f"exit code {end.code}"
print("peak RSS", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
"""


def base_distributions() -> set[str]:
    """The distributions that `pip install ldm-deploy` brings, found along the requirements' requirements."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in BASE]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, metadata.requires(name) or [])
    return found


@pytest.fixture(scope="session")
def base_modules() -> str:
    """The top-level modules of a base installation and of this project, as one argument for ONLY_BASE.

    What [build] names is out even where a base dependency happens to bring it along (tokenizers -> huggingface-hub ->
    pyyaml): the next release may not. What typer itself asks for stays: its releases from 0.29 on convert arguments
    with pydantic, and nobody can run the command line without.
    """
    by_typer = {canonicalize_name(Requirement(line).name) for line in metadata.requires("typer") or []}
    usable = base_distributions() - ({canonicalize_name(Requirement(line).name) for line in BUILD} - by_typer)
    owners = metadata.packages_distributions()
    modules = {m for m, names in owners.items() if any(canonicalize_name(n) in usable for n in names)}
    return ",".join(sorted(modules | set(PACKAGES)))


def test_the_base_is_what_it_should_be(base_modules):
    modules = set(base_modules.split(","))
    assert {"numpy", "onnxruntime", "tokenizers", "PIL", "typer", "rich"} <= modules
    assert not modules & {"torch", "diffusers", "transformers", "accelerate", "onnx", "safetensors"}


@pytest.mark.parametrize("module", ["torch", "diffusers", "transformers", "onnx", "yaml", "safetensors"])
def test_the_emulation_does_block(module, base_modules, run_python):
    code = f"{ONLY_BASE}\ntry:\n    import {module}\nexcept ModuleNotFoundError as e:\n    print(e)"
    assert f"No module named '{module}' in a base installation" in run_python(code, base_modules)


def test_everything_in_runtimes_imports_without_torch(base_modules, run_python):
    allowed = f"BACKENDS, SERVER = {BACKENDS}, {SERVER}"
    imported = run_python(f"{ONLY_BASE}\n{allowed}\n{IMPORT_EVERYTHING}", base_modules).split()
    files = (ROOT / "runtimes").rglob("*.py")
    assert len(imported) == sum(f != ROOT / "runtimes" / "__init__.py" for f in files)


def test_import_runtimes_is_quick_and_takes_no_onnxruntime(run_python):
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import runtimes\n"
        "print(time.perf_counter() - start, 'onnxruntime' in sys.modules)"
    )
    runs = [run_python(code).split() for _ in range(3)]
    seconds = min(float(seconds) for seconds, _ in runs)  # the least disturbed of three
    print(f"import runtimes: {seconds:.3f} s")
    assert seconds < MOST_SECONDS_TO_IMPORT_RUNTIMES
    assert {loaded for _, loaded in runs} == {"False"}


def test_a_copied_bundle_generates_without_torch(reference_bundle, base_modules, run_python, tmp_path):
    bundle = shutil.copytree(reference_bundle, tmp_path / "elsewhere" / "bundle")
    image = tmp_path / "out.png"
    arguments = ("generate", bundle, "a red apple", "--steps", "4", "--seed", "0", "-o", image)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ONLY_BASE}\n{COMMAND_LINE}"
    print(run_python(code, base_modules, *arguments, cwd=tmp_path).strip().splitlines()[-1])
    assert_is_a_image(image)


def test_a_bundle_is_diagnosed_without_torch(reference_bundle, base_modules, run_python, tmp_path):
    arguments = ("diagnose", reference_bundle, "--steps", "4", "--grid", tmp_path / "grid.png")
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ONLY_BASE}\n{COMMAND_LINE}"
    run_python(code, base_modules, *arguments, cwd=tmp_path)
    assert (tmp_path / "grid.png").is_file()


def assert_is_a_image(file: Path) -> None:
    from PIL import Image

    with Image.open(file) as image:
        assert len(set(image.convert("L").tobytes())) > 1, "one flat colour"


# ---- as users meet it: new virtual environments --------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the checkout, built from a copy: setuptools takes over stale files of a build/ folder."""
    source = tmp_path_factory.mktemp("source") / "ldm-deploy"
    source.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", source / "dist", source)
    return next((source / "dist").glob("*.whl"))


def pip(python: str | Path, *arguments: str | Path) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_packages_their_data_and_no_tests(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in names} == set(PACKAGES)
    data = [f for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sorted(names) == sorted(str(f.relative_to(ROOT)) for f in data)


def pinned() -> list[str]:
    return ["--constraint", str(ROOT / "constraints.txt")]


def floors() -> list[str]:
    return [line.replace(">=", "==") for line in BASE]


@pytest.mark.slow
@pytest.mark.parametrize("releases", [pinned, floors])
def test_the_wheel_and_its_base_dependencies_run_a_bundle(releases, wheel, reference_bundle, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", "--quiet", wheel, *releases())
    installed = {canonicalize_name(line.partition("==")[0]) for line in pip(python, "freeze").splitlines()}
    assert not installed & {"torch", "diffusers", "transformers", "onnx", "safetensors", "accelerate"}

    def ldm_deploy(*arguments: str | Path) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [str(python.with_name("ldm-deploy")), *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    bundle = shutil.copytree(reference_bundle, tmp_path / "bundle")
    assert "generate" in ldm_deploy("--help")
    assert "unet" in ldm_deploy("inspect", bundle, "--json")
    ldm_deploy("generate", bundle, "a red apple", "--steps", "4", "--seed", "0", "-o", tmp_path / "out.png")
    assert_is_a_image(tmp_path / "out.png")
