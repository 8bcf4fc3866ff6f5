"""Heavy work in a process of its own: its memory is given back whole, and its death is one clear error."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from deploy.observers import peak_rss_bytes
from runtimes.errors import DeployError, OutOfMemoryError, UnavailableError

T = TypeVar("T")
# Below it a process costs more (the import of torch) than it saves.
ISOLATE_ABOVE_BYTES = 512 << 20


def isolated(work: Callable[[], T], where: str) -> tuple[T, int]:
    """Run `work` in a new interpreter.

    Args:
        work: picklable, with a picklable result. What it raises is raised here.
        where: for errors.

    Returns:
        its result, and the most memory that the process had resident, in bytes.

    Raises:
        OutOfMemoryError: the kernel killed the process.
        UnavailableError: another signal ended it.
        DeployError: it ended without an answer.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and their locks
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(work, there), daemon=True)
    child.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        answer = None
    except BaseException:  # Ctrl-C: nothing goes on in the background
        child.kill()
        raise
    finally:
        child.join()
        here.close()
    if answer is None:
        raise _death(child.exitcode or 0, where)
    result, error, peak = answer
    if error is not None:
        raise error
    return result, peak


def _answer(work: Callable[[], T], connection: Connection) -> None:
    try:
        result, error = work(), None
    except Exception as problem:
        result, error = None, problem
    connection.send((result, error, peak_rss_bytes()))
    connection.close()


def _death(code: int, where: str) -> DeployError:
    if code == -signal.SIGKILL:
        return OutOfMemoryError(
            "the kernel killed the process that did this: memory ran out, most likely", where=where,
            fix="close other programs, add swap, or build on a machine with more memory; finished parts are kept")
    if code < 0:
        return UnavailableError(f"the process that did this was ended by {signal.Signals(-code).name}", where=where,
                                fix="run it again: finished parts are kept; report it if it happens twice")
    return DeployError(f"the process that did this ended with code {code} and no answer", where=where,
                       fix="this is a bug of ldm-deploy: report it")
