"""Reads text files as people's editors save them: with byte order marks, UTF-16 and all kinds of line ends."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from runtimes.errors import InputError

MARK = "\ufeff"  # a byte order mark, as a character
# Of the codings that say what they are. UTF-32's little-endian mark begins with UTF-16's.
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig"))


def read_text(file: Path) -> str:
    """A text file without its byte order mark: UTF-8, or UTF-16 and UTF-32 with a mark.

    Raises:
        InputError: unreadable, in another coding, or with a NUL, which no text has.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror}", where=str(file)) from error
    coding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    if b"\0" in content and coding.startswith("utf-8"):
        raise _no_text(content.count(b"\n", 0, content.index(b"\0")) + 1, file)
    try:
        text = content.decode(coding)
    except UnicodeDecodeError as error:
        raise InputError(f"not {coding.removesuffix('-sig').upper()}: byte {error.start} is "
                         f"0x{content[error.start]:02x}", where=str(file), fix="save it as UTF-8") from error
    if "\0" in text:
        raise _no_text(text.count("\n", 0, text.index("\0")) + 1, file)
    return text


def _no_text(line: int, file: Path) -> InputError:
    return InputError(f"line {line} holds a NUL, so this is no text file, or one in UTF-16 without its mark",
                      where=str(file), fix="save it as UTF-8")


def lines_of(text: str) -> list[str]:
    """Lines, ended as Unix, Windows or old Macs end them; other separators of Unicode belong to the text.

    A byte order mark at the beginning of a line is left out: files with one are put together without a look inside.
    """
    return [line.lstrip(MARK) for line in re.split(r"\r\n|\r|\n", text)]
