"""`python -m tests.gpu` (`make gpu`): what a machine with an NVIDIA GPU can prove, in under 8 minutes.

Needs Python 3.11 and this tree; no network, and no package beyond those that are installed. Each check passes, fails,
or says why it could not run. Exit code: 0 all that ran passed and CUDA itself was among it, 1 something failed, 4 no
GPU, or nothing here to reach it with.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable

from tests.gpu.checks import CHECKS, CUDA_CHECKS, GPU, PYTEST_SECONDS, Unverified

LIMIT_SECONDS = 8 * 60.0 - PYTEST_SECONDS - 20  # no check begins later: the last, the longest, still ends in 8 minutes


def main(checks: dict[str, Callable[[], str]] | None = None, *, limit_seconds: float = LIMIT_SECONDS) -> int:
    """Run every check and print a line for each, then the sums."""
    checks = CHECKS if checks is None else checks
    began, results = time.monotonic(), dict[str, str]()
    for name, check in checks.items():
        start = time.monotonic()
        try:
            if results.get(GPU) == "unverified":
                raise Unverified("no GPU answers, see above")
            if start - began > limit_seconds:
                raise Unverified(f"{limit_seconds:.0f} s are over")
            detail = check()
        except Unverified as reason:
            results[name] = "unverified"
            _say("UNVERIFIED", name, f"because {reason}")
        except Exception as error:
            results[name] = "failed"
            traceback.print_exc()
            _say("FAILED", name, f"{type(error).__name__}: {error}")
        else:
            results[name] = "passed"
            _say("PASSED", name, f"{detail} ({time.monotonic() - start:.1f} s)")
    counts = {kind: sum(r == kind for r in results.values()) for kind in ("passed", "failed", "unverified")}
    print(f"{', '.join(f'{n} {kind}' for kind, n in counts.items())}; {time.monotonic() - began:.0f} s", flush=True)
    if counts["failed"]:
        return 1
    return 0 if all(results.get(name) == "passed" for name in CUDA_CHECKS if name in checks) else 4


def _say(verdict: str, name: str, detail: str) -> None:
    print(f"{verdict:10} {name}: {detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
