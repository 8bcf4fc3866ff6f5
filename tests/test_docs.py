"""Every path, module and command that README, docs and CONTRIBUTING name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_help import every_option

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
PACKAGES = ("deploy", "exporters", "calibration", "runtimes", "tests")
OURS = "|".join(PACKAGES)
# A path of ours, in words or as the target of a link: folder/…/name.ext, or folder/.
PATH = re.compile(rf"(?<![\w./-])((?:{OURS}|docs|\.ci)/[\w./*-]*[\w/*])")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
MODULE = re.compile(rf"(?<![\w./-])((?:{OURS})(?:\.[a-z_]\w*)+)")
COMMAND = re.compile(rf"-m ((?:{OURS})[\w.]*)")
FILE = re.compile(r"`(\w+\.py)`")
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")
OURS_ALONE = re.compile(r"python -m deploy ([a-z-]+)([^\n`|#]*)")
MADE = re.compile(r"[A-Z]{4,}")  # a NAME that a recipe's reader chooses


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {path.rstrip("/.") for path in PATH.findall(text)}
    named |= {str((ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT)) for link in LINK.findall(text)}
    assert not sorted(path for path in named if not MADE.search(path) and not any(ROOT.glob(path)))


@pytest.mark.parametrize("page", PAGES)
def test_every_module_function_and_command_that_a_page_names_exists(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not sorted(name for name in set(MODULE.findall(text)) if not MADE.search(name) and not exists(name))
    assert not sorted(name for name in set(COMMAND.findall(text)) if not runs(name))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_without_its_folder_exists(page: str):
    named = set(FILE.findall((ROOT / page).read_text(encoding="utf-8")))
    assert not sorted(name for name in named if not MADE.search(name) and not any(
        found for top in PACKAGES for found in (ROOT / top).rglob(name)))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_ours_on_a_page_has_the_options_that_it_is_given(page: str):
    flags: dict[str, set[str]] = {}
    for name, option in every_option().items():
        flags.setdefault(name.split(" -")[0], set()).update(option.opts, option.secondary_opts)
    for command, arguments in OURS_ALONE.findall((ROOT / page).read_text(encoding="utf-8")):
        inner = f"{command} {arguments.split()[0]}" if arguments.split() else command
        command = inner if inner in flags else command
        assert command in flags, f"no command {command}"
        assert not {flag for flag in FLAG.findall(arguments) if flag not in flags[command]}, f"{command} {arguments}"


def exists(name: str) -> bool:
    """Whether it is a module, or a name inside one (`deploy.build`, `runtimes.Request`, `tests.module.Class`)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:length])
        file = folder.with_suffix(".py") if folder.with_suffix(".py").is_file() else folder / "__init__.py"
        if file.is_file():
            inside = parts[length:]
            return not inside or re.search(rf"\b{inside[0]}\b", file.read_text(encoding="utf-8")) is not None
    return False


def runs(name: str) -> bool:
    """Whether `python -m` runs it."""
    file = ROOT.joinpath(*name.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    return file.is_file() and (file.name == "__main__.py" or '__name__ == "__main__"' in file.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_asks_for_by_name_is_there(page: str):
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text(encoding="utf-8"))
    for command in re.findall(r"pytest ([^`\n]*)", text):
        files = "".join((ROOT / file.split("::")[0]).read_text(encoding="utf-8") for file in command.split()
                        if file.split("::")[0].endswith(".py") and not MADE.search(file))
        named = re.findall(r"-k ([a-z]\w*)", command) + re.findall(r"::(\w+)", command)
        assert not [name for name in named if files and name not in files], command


@pytest.mark.parametrize("page", (*PAGES, "Makefile", "CHANGELOG.md"))
def test_pages_have_the_fields_words(page: str):
    words = re.compile(r"(?i)\b(pictures?|drawn?|drawings?|draws|drew|told|beg[au]n|begins?|borne?)\b")
    assert not words.findall((ROOT / page).read_text(encoding="utf-8"))
