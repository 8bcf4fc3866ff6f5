"""A process that takes and finishes jobs in a store and is killed: at a named point, or whenever its parent likes.

    python -m tests.serving.kill_worker STATE LEDGER SEED [POINT COUNT]

The ledger is the client's own: a line is written, and on disk, once `accept` has returned an id.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from pathlib import Path

from runtimes.serving.state.job_store import JobStore


def image_of(request: object) -> bytes:
    """What a job's image is, whoever computes it: deterministic in the request, a few KB."""
    return hashlib.sha256(repr(request).encode()).digest() * 200


def main(state: Path, ledger: Path, seed: int, point: str = "", count: int = 0) -> None:
    """Work until killed."""
    left = [count]

    def checkpoint(name: str) -> None:
        if name == point:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    chance = random.Random(seed)
    store = JobStore(state, checkpoint=checkpoint, reserve_bytes=0)
    print("ready", flush=True)
    with ledger.open("a", encoding="utf-8") as accepted:
        while True:
            for _ in range(chance.randint(0, 3)):
                request = {"prompt": f"{seed}-{chance.random()}", "seed": chance.randrange(1 << 31)}
                job = store.accept(request, model="m")
                accepted.write(f"{job.id}\n")
                accepted.flush()
                os.fsync(accepted.fileno())
            for job in store.claim("engine", ["m"], chance.randint(1, 3)):
                if chance.random() < 0.1:
                    store.fail(job.id, "chance")
                elif chance.random() < 0.1:
                    store.cancel(job.id)
                else:
                    store.complete(job.id, [(image_of(job.request), "png")], {})
            if chance.random() < 0.1:
                store.retain(seconds=1e9, image_bytes=1 << 40)


if __name__ == "__main__":
    point, count = (sys.argv[4], int(sys.argv[5])) if len(sys.argv) > 4 else ("", 0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), point, count)
