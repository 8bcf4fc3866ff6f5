"""Prompt files as Windows, Macs and careless tools write them mean what they would mean without."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.trajectory.prompts import read_prompts
from runtimes.errors import InputError

PROMPTS = ("a red apple", "a café, 東京")
PLAIN = "a red apple\na café, 東京\n"


@pytest.mark.parametrize("content", [
    PLAIN.encode(), PLAIN.encode("utf-8-sig"), PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
    PLAIN.replace("\n", "\r").encode(), PLAIN.encode("utf-16"), ("\ufeff" + PLAIN).encode("utf-16-be"),
    PLAIN.encode("utf-32"), ("\ufeff" + PLAIN).encode("utf-32-be"), f"\n\n  {PLAIN}\n \t\n".encode(),
    "\ufeffa red apple\r\n\ufeffa café, 東京".encode(),
], ids=["plain", "mark", "mark-crlf", "cr", "utf-16", "utf-16-be", "utf-32", "utf-32-be", "blank lines", "two files"])
def test_the_prompts_are_the_same_however_the_file_was_saved(tmp_path: Path, content: bytes):
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == PROMPTS


def test_other_separators_of_unicode_stay_within_a_prompt(tmp_path: Path):
    (tmp_path / "p.txt").write_text("a cat\u2028on a mat\x0b, blue\x85\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("a cat\u2028on a mat\x0b, blue",)


@pytest.mark.parametrize(("content", "said"), [
    (b"a red apple\na c\x00t\n", "line 2 holds a NUL"), (PLAIN.encode("utf-16-le"), "without its mark"),
    (b"caf\xe9\n", "not UTF-8: byte 3 is 0xe9"), (b"\xff\xfea", "not UTF-16"), (b"\xef\xbb\xbf\r\n", "no prompt"),
    (b"", "no prompt"),
])
def test_what_is_no_text_is_refused_with_its_name(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(tmp_path / "p.txt")
    assert caught.value.where == str(tmp_path / "p.txt")


def test_a_folder_and_a_file_that_is_missing_are_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(InputError, match="cannot read it"):
            read_prompts(path)
