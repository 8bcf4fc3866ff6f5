"""The one family of errors a user meets. Every other exception that escapes is a bug of ours (exit code 1).

    DeployError                 what, where, fix, exit_code
    ├── InputError        (2)   bad input or usage
    │   └── BundleError   (2)   a bundle that is broken, changed, or from another schema
    ├── ParityError       (3)   an accuracy budget is broken
    ├── UnavailableError  (4)   something this machine lacks: a package, a driver, disk
    │   └── OutOfMemoryError (4) memory, of the host or of a device: smaller pieces may fit
    └── CancelledError    (130) the caller ended it: not a failure
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class DeployError(Exception):
    """An error with what is wrong, where, and what to do about it.

    Attributes:
        what: one sentence, no traceback needed to understand it.
        where: file, component, option or prompt that the sentence is about.
        fix: what the user can do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" ({self.fix})" if self.fix else ""
        return f"{place}{self.what}{remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[DeployError], what: str, where: str, fix: str) -> DeployError:
    """Pickling across processes calls with positional arguments only."""
    return kind(what, where=where, fix=fix)


class InputError(DeployError):
    """Bad input or usage."""

    exit_code = 2


class BundleError(InputError):
    """A bundle that is broken, changed since it was built, or from a newer schema."""


class ParityError(DeployError):
    """An accuracy budget is broken.

    Attributes:
        figures: the object that `verify --json` prints, where whole images were compared.
    """

    exit_code = 3
    figures: Mapping[str, Any] | None = None


class UnavailableError(DeployError):
    """Something this machine lacks."""

    exit_code = 4


class OutOfMemoryError(UnavailableError):
    """Memory ran out, of the host or of a device. A smaller batch or size may fit."""


class CancelledError(DeployError):
    """The caller ended a call of the pipeline. Nothing of it is left behind; the pipeline can be used on.

    Attributes:
        steps_taken: denoising steps that were finished.
        total: steps that the call would have taken.
    """

    exit_code = 130

    def __init__(self, steps_taken: int, total: int) -> None:
        """Say how far it came."""
        super().__init__(f"cancelled after {steps_taken} of {total} steps", where="generate")
        self.steps_taken, self.total = steps_taken, total

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.steps_taken, self.total)
