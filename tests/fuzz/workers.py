"""Cases by number, in this process or in several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.fuzz.report import Result


def run_number(number: int) -> Result:
    """Generate and run one case."""
    from tests.fuzz.cases import make
    from tests.fuzz.choices import Choices
    from tests.fuzz.run import run_case

    began = time.perf_counter()
    choices = Choices(number)
    try:
        verdict = run_case(make(choices))[0]
    except Exception as error:  # neither side, but what makes their input
        return Result(number, "fuzzer broke", f"{type(error).__name__}: {error}"[:200], "", False,
                      tuple(choices.met), time.perf_counter() - began)
    return Result(number, verdict.status, verdict.reason, verdict.detail, verdict.diffusers_runs,
                  tuple(set(choices.met)), time.perf_counter() - began)


def start_worker() -> None:
    """Before the first case of a process."""
    from tests.fuzz.run import quiet_libraries

    quiet_libraries()


def run_numbers(numbers: range, workers: int) -> Iterator[Result]:
    """The cases of these numbers, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        yield from pool.map(run_number, numbers, chunksize=4)
