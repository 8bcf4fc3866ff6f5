"""A process that takes and finishes jobs in a store and is killed: at a named point, or whenever its parent likes.

    python -m tests.serving.kill_worker STATE LEDGER SEED [POINT COUNT]

The ledger is the client's own: a line is written, and on disk, once `accept` has returned an id or a call has said that
it ended a job.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from runtimes.serving.state.job_store import JobStore

POINTS = ("before the input's fsync", "before the input's rename", "after the input's rename",
          "before the job's commit", "after the job's commit", "after the claim", "before the image's fsync",
          "before the image's rename", "after the image's rename", "before the completion's commit",
          "after the completion's commit", "before unused images are removed", "before a commit", "after a commit")


def image_of(request: object) -> bytes:
    """What a job's image is, whoever computes it: deterministic in the request, a few KB."""
    return hashlib.sha256(repr(request).encode()).digest() * 200


def killing(point: str, count: int) -> Callable[[str], None]:
    """A checkpoint that kills this process the `count`-th time, from 0, that it comes to a point; never for ""."""
    left = [count]

    def checkpoint(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return checkpoint


def main(state: Path, ledger: Path, seed: int, point: str = "", count: int = 0) -> None:
    """Work until killed."""
    chance = random.Random(seed)
    store = JobStore(state, checkpoint=killing(point, count), reserve_bytes=0)
    print("ready", flush=True)
    with ledger.open("a", encoding="utf-8") as lines:
        def note(identity: str, status: str) -> None:
            lines.write(f"{identity} {status}\n")
            lines.flush()
            os.fsync(lines.fileno())

        while True:
            for _ in range(chance.randint(0, 3)):
                file = chance.randbytes(1000)
                request = {"prompt": f"{seed}-{chance.random()}", "file": hashlib.sha256(file).hexdigest()}
                job = store.accept(request, model="m", files={hashlib.sha256(file).hexdigest(): file})
                note(job.id, "accepted")
            for job in store.claim("engine", ["m"], chance.randint(1, 3)):
                work(store, job.id, chance, note)
            if chance.random() < 0.1:
                store.retain(seconds=1e9, image_bytes=1 << 40)


def work(store: JobStore, identity: str, chance: random.Random, note: Callable[[str, str], None]) -> None:
    """One claimed job: to one of its ends, or put back."""
    kind = chance.choices(("failed", "cancelled", "put back", "completed"), (1, 1, 1, 7))[0]
    if kind == "failed" and store.fail(identity, "chance"):
        note(identity, kind)
    elif kind == "cancelled" and store.cancel(identity):
        note(identity, kind)
    elif kind == "put back":
        store.requeue(identity)
    elif kind == "completed":
        job = store.job(identity)
        assert list(store.files(identity)) == [job.request["file"]]
        if store.complete(identity, [(image_of(job.request), "png")], {}):
            note(identity, kind)


if __name__ == "__main__":
    point, count = (sys.argv[4], int(sys.argv[5])) if len(sys.argv) > 4 else ("", 0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), point, count)
