"""`make fuzz CASES=500`: generated cases in two processes; failures are shrunk and written as JSON.

    python -m tests.fuzz 500 --seed 3 --json report.json      cases 3,000,000 to 3,000,499
    python -m tests.fuzz --replay case.json                    one case again, both sides in full
    python -m tests.fuzz --planted                             faults put into our code, each found?
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tests.fuzz import case as cases_on_disk
from tests.fuzz.report import Report
from tests.fuzz.workers import run_numbers, start_worker

PER_SEED = 1_000_000


def replay(file: Path) -> int:
    """Run a written case and say what both sides did; 0 if the verdict is no failure."""
    from tests.fuzz.report import PASSED
    from tests.fuzz.run import run_case
    from tests.fuzz.trace import Trace

    start_worker()
    verdict, mine, theirs = run_case(cases_on_disk.load(file))
    for name, side in (("ours", mine), ("diffusers", theirs)):
        print(f"{name}: {f'{len(side.calls)} denoiser calls' if isinstance(side, Trace) else side}")
    print(f"{verdict.status}: {verdict.detail or verdict.reason}")
    return 0 if verdict.status in PASSED else 1


def shrink_failures(report: Report, folder: Path, seconds: float, most: int) -> None:
    """Write the plainest case of each kind of failure."""
    from tests.fuzz.shrink import shrink

    start_worker()
    folder.mkdir(parents=True, exist_ok=True)
    first: dict[str, Any] = {}
    for failure in report.failures:
        if failure.status == "different":
            first.setdefault(failure.reason, failure)
    for failure in list(first.values())[:most]:
        case = shrink(failure.number, failure.reason, seconds)
        if case is None:
            print(f"\ncase {failure.number}: {failure.detail}\n  it did not fail again")
            continue
        file = folder / f"{failure.number}.json"
        case.save(file)
        print(f"\ncase {failure.number}: {failure.detail}\n  plainest: {file.read_text(encoding='utf-8').strip()}\n"
              f"  again: python -m tests.fuzz --replay {file}")


def main(arguments: list[str]) -> int:
    """0 if nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="other cases for each (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one core and 2 GB each (default: 2)")
    parser.add_argument("--json", type=Path, help="write the report there too")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="where shrunk cases are written")
    parser.add_argument("--shrink-seconds", type=float, default=60, help="for each kind of failure (default: 60)")
    parser.add_argument("--shrink-most", type=int, default=8, help="kinds of failures that are shrunk (default: 8)")
    parser.add_argument("--replay", type=Path, help="run one written case")
    parser.add_argument("--planted", action="store_true", help="find the faults of tests/fuzz/planted.py")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return replay(options.replay)
    if options.planted:
        from tests.fuzz.planted import find_all

        return find_all(options.workers)
    report, first, began = Report(), options.seed * PER_SEED, time.monotonic()
    for result in run_numbers(range(first, first + options.cases), options.workers):
        report.add(result)
        if report.tried % 50 == 0:
            seconds = time.monotonic() - began
            print(f"{report.tried} cases, {seconds:.0f} s, {len(report.failures)} failures", flush=True)
    print(report.text())
    if options.json is not None:
        report.save(options.json)
    if report.failures:
        shrink_failures(report, options.failures, options.shrink_seconds, options.shrink_most)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
