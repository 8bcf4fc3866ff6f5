"""How options name a device: its kind and, where a machine has several of that kind, which one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from runtimes.errors import InputError

# Kind -> whether a machine may have several, so that a number says which.
KINDS = {"cpu": False, "cuda": True, "tensorrt": True, "tensorrt-rtx": True, "gpu": True, "npu": False, "auto": False}
FORMS = "cpu, auto, npu, or one of cuda, tensorrt, tensorrt-rtx and gpu, with a number where there are several: cuda:1"
_FORM = re.compile(r"([a-z-]+)(?:[:.]([0-9]{1,4}))?")


@dataclass(frozen=True)
class Device:
    """One device of a machine.

    Attributes:
        kind: "cpu"; "cuda", "tensorrt" and "tensorrt-rtx" are the ways of NVIDIA's libraries to a GPU; "gpu", "npu" and
            "auto" are OpenVINO's. Each backend refuses what it does not know.
        index: which of several: NVIDIA's as CUDA counts them in this process, OpenVINO's as it lists them. From 0.

    Raises:
        InputError: no such kind, or a number where there is only one device.
    """

    kind: str = "cpu"
    index: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown device {self.kind!r}", where="device", fix=f"use {FORMS}")
        if self.index < 0 or (self.index and not KINDS[self.kind]):
            raise InputError(f"{self.kind} has no number {self.index}", where="device", fix=f"use {FORMS}")

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """Read `KIND` or `KIND:NUMBER`, in capitals or not; OpenVINO's own `GPU.1` is taken, too.

        Raises:
            InputError: it is not of that form, or `Device` refuses it.
        """
        if isinstance(text, cls):
            return text
        found = _FORM.fullmatch(str(text).strip().lower())
        if found is None or (found[2] and not KINDS.get(found[1], True)):
            raise InputError(f"{text!r} is no device", where="device", fix=f"use {FORMS}")
        return cls(found[1], int(found[2] or 0))

    def __str__(self) -> str:
        """The form that `parse` reads; the first of a kind has no number."""
        return f"{self.kind}:{self.index}" if self.index else self.kind


CPU = Device()
