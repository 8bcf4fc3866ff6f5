"""Records what TensorRT reports, and turns it into our errors."""

from __future__ import annotations

import re
from typing import Any

from runtimes.errors import DeployError, OutOfMemoryError

OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory|cannot allocate|failed to allocate",
                           re.IGNORECASE)


def error_recorder(trt: Any) -> Any:
    """A recorder for a builder or a runtime, which hands it on to its engines and their contexts.

    A logger in Python would do too, but it is called for every line that a verbose log would have, and the builder
    waits for it: 300 s of calls in a build of 8 s.
    """

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Keeps errors as (code, description)."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: list[tuple[Any, str]] = []

        def clear(self) -> None:
            self.errors.clear()

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def num_errors(self) -> int:
            return len(self.errors)

        def report_error(self, code: Any, description: str) -> bool:
            self.errors.append((code, description))
            return False

    return Recorder()


class TensorRtErrors:
    """The errors of one engine's runtime. TensorRT itself answers with False, None or a RuntimeError alone."""

    def __init__(self, trt: Any, where: str) -> None:
        self.recorder, self._where = error_recorder(trt), where

    def require(self, answer: Any, doing: str) -> Any:
        """The answer, unless it is TensorRT's no.

        Raises:
            OutOfMemoryError: an allocation failed, so that a smaller batch may fit.
            DeployError: anything else, with TensorRT's first words about it.
        """
        if answer is None or answer is False:
            raise self.explained(doing)
        self.recorder.clear()
        return answer

    def explained(self, doing: str, error: Exception | None = None) -> DeployError:
        """What was recorded since the last success, as one of our errors; forgotten afterwards."""
        recorded = list(self.recorder.errors)
        self.recorder.clear()
        texts = [" ".join(text.split()) for _, text in recorded] + ([str(error)] if error is not None else [])
        said = texts[0][:400] if texts else "it says no more"
        failed = any(getattr(code, "name", "") == "FAILED_ALLOCATION" for code, _ in recorded)
        if failed or any(OUT_OF_MEMORY.search(text) for text in texts):
            return OutOfMemoryError(f"the GPU is out of memory ({doing}): {said}", where=self._where,
                                    fix="use a smaller batch or size")
        return DeployError(f"TensorRT failed ({doing}): {said}", where=self._where)
