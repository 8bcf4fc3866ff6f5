"""Reads numbers of bytes as people write them: 800MB, 2.5GB, 2GiB."""

from __future__ import annotations

from contextlib import suppress

from runtimes.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str, where: str, least: int = 1) -> int:
    """Read 800MB, 2.5GB or 2GiB.

    Args:
        text: a number and a unit; bytes without one.
        where: the option, for the error.
        least: what is smaller is refused.

    Raises:
        InputError: not of this form, or less than `least`.
    """
    number = text.strip().rstrip("BbGgIiKkMmTt")
    with suppress(ValueError, KeyError, OverflowError):
        size = int(float(number) * UNITS[text.strip()[len(number):].upper()])
        if size >= least:
            return size
    raise InputError(f"{text!r} is not a size", where=where, fix="write 800MB or 2.5GB")
