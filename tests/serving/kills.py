"""A server killed with -9 while a client posts jobs to it: at each point of the commit sequence, and at random moments.

    python -m tests.serving.kills --each 10 --random 100 [--bundle /path/of/a/bundle]

The client keeps a ledger of its own, fsynced: what it asked for, which ids were returned, which ends it saw. After the
last start every accepted job must have ended, once, completed with the bytes of its lone run in another process or
failed with a reason. All of it on the loopback. It does not prove that a loss of power loses nothing: the kernel lives
on through a kill, and writes what the process has given it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from deploy.cli.serve_commands import reference
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.store import COMPLETED, ENDED, FAILED, OPEN
from tests.serving.kill_worker import POINTS
from tests.serving.killed_client import Client, LoneRuns, ServerFault
from tests.serving.killed_server import Killed

JOBS_OF_A_LIFE = 10
START_SECONDS, LIFE_SECONDS, DRAIN_SECONDS = 120.0, 60.0, 300.0  # on a machine that is busy with other things
RETENTION = "before unused images are removed"  # comes once, when a server starts


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        kills: by point, "random" among them.
        ready: seconds from a start to the first request taken, after a kill.
        faults: everything that should not be; empty is a pass.
    """

    kills: Counter[str] = field(default_factory=Counter)
    ready: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def trial(bundle: Path, folder: Path, each: int, at_random: int, seed: int) -> Outcome:
    """All kills, then the check. No server outlives it."""
    outcome = Outcome()
    server, client = Killed(bundle, folder), Client(folder / "ledger.jsonl", seed)
    try:
        kill_all(server, client, each, at_random, seed, outcome)
        server.start("", 0)
        if not server.wait_until_ready(START_SECONDS):
            outcome.faults.append("the server does not start after the last kill")
            return outcome
        drain(server, client, outcome)
        check_answers(server, client, LoneRuns(bundle), outcome)
        if (code := server.end()) != 0:
            outcome.faults.append(f"SIGTERM ended the server with {code}")
        check_folder(folder / "state", client, outcome)
    finally:
        server.kill()
    return outcome


def kill_all(server: Killed, client: Client, each: int, at_random: int, seed: int, outcome: Outcome) -> None:
    """A server's life after the other, in one folder."""
    chance = random.Random(seed)
    lives = [(point, 0 if point == RETENTION else chance.randint(0, 6)) for point in POINTS for _ in range(each)]
    for number, (point, count) in enumerate([*lives, *[("", 0)] * at_random]):
        server.start(point, count)
        usual = statistics.median(outcome.ready) if outcome.ready else 2.0
        one_life(server, client, None if point else chance.uniform(0, 1.5 * usual + 1), outcome)
        if server.alive and point:
            outcome.faults.append(f"{point!r} was not reached the {count}-th time")
        server.kill()
        outcome.kills[point or "random"] += 1
        if number % 20 == 19:
            print(f"{number + 1} of {len(lives) + at_random} kills, {len(client.accepted)} jobs accepted", flush=True)


def one_life(server: Killed, client: Client, seconds: float | None, outcome: Outcome) -> None:
    """Use a server until it is killed by its own hand, or so many seconds after its start."""
    until = time.monotonic() + (START_SECONDS if seconds is None else seconds)
    if not server.wait_until_ready(until - time.monotonic()):
        return
    outcome.ready.append(server.ready_seconds)
    until, posted = time.monotonic() + LIFE_SECONDS if seconds is None else until, 0
    while server.alive and time.monotonic() < until:
        try:
            if posted < JOBS_OF_A_LIFE or not client.accepted:
                posted += 1
                client.post(server.port)
            else:
                client.look(server.port)
                posted -= bool(server.point)  # one more, since its point was not reached yet
        except ServerFault as fault:
            outcome.faults.append(str(fault))
        except (OSError, ValueError):  # it died before, within or after its answer
            pass
        time.sleep(0.01)


def drain(server: Killed, client: Client, outcome: Outcome) -> None:
    """Post again what was never answered, then wait until every accepted job has ended."""
    client.post_again(server.port)
    until, waiting = time.monotonic() + DRAIN_SECONDS, set(client.accepted)
    while waiting and time.monotonic() < until:
        waiting = {identity for identity in waiting
                   if (client.job(server.port, identity) or {"status": ENDED[0]})["status"] in OPEN}
        time.sleep(0.2 if waiting else 0)
    outcome.faults += [f"{identity} has not ended" for identity in waiting]


def check_answers(server: Killed, client: Client, alone: LoneRuns, outcome: Outcome) -> None:
    """What the server says of every accepted job, and the bytes of its images."""
    for identity in client.accepted:
        job = client.job(server.port, identity)
        if job is None:
            if identity not in client.deleted:
                outcome.faults.append(f"{identity} is lost")
            continue
        seen = client.ends.get(identity, job["status"])
        if seen != job["status"]:
            outcome.faults.append(f"{identity} was {seen} and is {job['status']}")
        if job["status"] == FAILED and not job["reason"]:
            outcome.faults.append(f"{identity} failed without a reason")
        if job["status"] == COMPLETED:
            outcome.faults += alone.differences(job, client.file_of(identity), client.images(server.port, job))
        elif job["status"] not in ENDED or (job["status"] != FAILED and identity not in client.deleted):
            outcome.faults.append(f"{identity} is {job['status']}")


def check_folder(state: Path, client: Client, outcome: Outcome) -> None:
    """The store itself: nothing runs, nothing is half there, every file is what its name says."""
    with JobStore(state, reserve_bytes=0) as store:
        counts = store.counts()
        reasons = Counter(job.reason for job in store.jobs("", most=1_000_000, statuses=(FAILED,)))
        unknown = {job.id for job in store.jobs("", most=1_000_000)} - client.accepted.keys()
    print(f"jobs by status: {counts}; reasons of failures: {dict(reasons)}")
    print(f"jobs that were committed, but whose answer never came and was never asked for again: {len(unknown)}")
    outcome.faults += [f"{status}: {counts[status]} after the end" for status in OPEN if counts[status]]
    if unknown:
        outcome.faults.append(f"{len(unknown)} jobs that no key of the client names")
    for file in (*(state / "images").iterdir(), *(state / "inputs").iterdir()):
        if hashlib.sha256(file.read_bytes()).hexdigest() != file.stem:
            outcome.faults.append(f"{file.name} is not what its name says")


def main() -> int:
    """Run and print; 0 for a pass."""
    parser = argparse.ArgumentParser(prog="tests.serving.kills", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--each", type=int, default=10, help="kills at each point")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--bundle", type=Path, help="whose images do not depend on company [the reference model]")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        outcome = trial(given.bundle or reference(), Path(folder), given.each, given.random, given.seed)
    print(f"kills: {json.dumps(outcome.kills)}")
    if outcome.ready:
        ordered = sorted(outcome.ready)
        print(f"ready after a start: median {statistics.median(ordered):.2f} s, 95 % within "
              f"{ordered[int(0.95 * (len(ordered) - 1))]:.2f} s, at most {ordered[-1]:.2f} s ({len(ordered)} starts)")
    for fault in outcome.faults[:50]:
        print(f"FAULT {fault}")
    print(f"{sum(outcome.kills.values())} kills, {len(outcome.faults)} faults, {time.monotonic() - began:.0f} s. "
          "A loss of power is another matter, which this does not prove.")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
