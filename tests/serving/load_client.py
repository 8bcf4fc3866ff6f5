"""Load on a server that generates images: what is asked, clients that wait for answers, arrivals that do not.

    python -m tests.serving.load_client < PLAN > RECORDS          # both JSON: the fields of `Plan`; `Record`s

A process of its own, so that what it computes is not the server's, nor the judge's. Every request has its own seed.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import math
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from time import perf_counter, process_time
from typing import Any

import httpx

STEPS = (4, 10, 25)
SUBJECTS = ("a red apple", "a cat", "a house", "the moon", "a rocket", "a green heart", "an octopus", "a teddy bear")
OK = 200


@dataclass(frozen=True)
class Ask:
    """One image that is asked for."""

    prompt: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Record:
    """One request, in seconds since the load began.

    Attributes:
        steps: denoising steps.
        due: when it should be sent: by its arrival, or as its client was free.
        ended: when its answer was there.
        status: of HTTP; 0 where there was no answer.
        bytes: of the image file.
        reason: why it failed, else empty.
    """

    steps: int
    due: float
    ended: float
    status: int
    bytes: int = 0
    reason: str = ""

    @property
    def seconds(self) -> float:
        """From when it was due, so that a late sender hides nothing."""
        return self.ended - self.due


@dataclass(frozen=True)
class Plan:
    """A load.

    Attributes:
        url: of the server, as http://127.0.0.1:8000.
        protocol: key of `PROTOCOLS`.
        seconds: as long new requests are sent; those under way are waited for.
        clients: in a closed loop: each sends its next request when it has its answer.
        rate: requests each second of an open loop, with Poisson arrivals; 0 for a closed loop.
        steps: of the requests, all equally often.
        seed: of steps, prompts, seeds and arrivals.
        timeout: seconds after which a request has failed.
    """

    url: str
    protocol: str
    seconds: float
    clients: int = 1
    rate: float = 0.0
    steps: tuple[int, ...] = STEPS
    seed: int = 0
    timeout: float = 120.0


Send = Callable[[Ask], Awaitable[tuple[int, bytes]]]


def asks(steps: Sequence[int], seed: int) -> Iterator[Ask]:
    """Without end; every block of them has each number of steps once, in an order of its own."""
    chance = random.Random(seed)
    for number in itertools.count():
        if number % len(steps) == 0:
            block = chance.sample(list(steps), len(steps))
        yield Ask(f"{chance.choice(SUBJECTS)} {number}", block[number % len(steps)], seed * 1_000_000 + number)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals within so many seconds, ascending."""
    chance, at, times = random.Random(seed), 0.0, list[float]()
    while (at := at + chance.expovariate(rate)) < seconds:
        times.append(at)
    return times


# ---- how a server is asked ---------------------------------------------------------------------------------------


async def openai(client: httpx.AsyncClient, ask: Ask) -> tuple[int, bytes]:
    """Status and image of OpenAI's route, as a file in base64."""
    answer = await client.post("/v1/images/generations", json={
        "prompt": ask.prompt, "num_inference_steps": ask.steps, "seed": ask.seed, "response_format": "b64_json"})
    if answer.status_code != OK:
        return answer.status_code, answer.content[:300]
    return OK, base64.b64decode(answer.json()["data"][0]["b64_json"])


async def imagine(client: httpx.AsyncClient, ask: Ask) -> tuple[int, bytes]:
    """Status and image of the route that Ray Serve's tutorial has."""
    answer = await client.get("/imagine", params={"prompt": ask.prompt, "steps": ask.steps, "seed": ask.seed})
    return answer.status_code, answer.content


PROTOCOLS = {"openai": openai, "imagine": imagine}


@asynccontextmanager
async def sender(plan: Plan) -> AsyncIterator[Send]:
    """Sends requests over connections that stay open, as many as there are requests at a time."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=plan.url, timeout=plan.timeout, limits=limits, trust_env=False) as client:
        yield lambda ask: PROTOCOLS[plan.protocol](client, ask)


# ---- loads -------------------------------------------------------------------------------------------------------


async def recorded(send: Send, ask: Ask, due: float, clock: Callable[[], float]) -> Record:
    """Send one request and say what came of it."""
    try:
        status, content = await send(ask)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Record(ask.steps, due, clock(), 0, 0, f"{type(error).__name__}: {error}"[:300])
    if status != OK:
        return Record(ask.steps, due, clock(), status, 0, content[:300].decode(errors="replace"))
    return Record(ask.steps, due, clock(), status, len(content))


async def closed_loop(send: Send, plan: Plan) -> list[Record]:
    """So many clients, each with one request at a time; they take the next of one sequence."""
    began, source, records = perf_counter(), asks(plan.steps, plan.seed), list[Record]()

    def clock() -> float:
        return perf_counter() - began

    async def client() -> None:
        while (due := clock()) < plan.seconds:
            records.append(await recorded(send, next(source), due, clock))
            if records[-1].status != OK:
                await asyncio.sleep(0.1)  # a server that refuses at once is not asked without end

    await asyncio.gather(*(client() for _ in range(plan.clients)))
    return records


async def open_loop(send: Send, plan: Plan) -> list[Record]:
    """Requests that arrive whether or not earlier ones were answered."""
    began, source = perf_counter(), asks(plan.steps, plan.seed)
    tasks: list[asyncio.Task[Record]] = []

    def clock() -> float:
        return perf_counter() - began

    for due in arrivals(plan.rate, plan.seconds, plan.seed):
        await asyncio.sleep(max(due - clock(), 0.0))
        tasks.append(asyncio.create_task(recorded(send, next(source), due, clock)))
    return list(await asyncio.gather(*tasks))


async def run(plan: Plan) -> list[Record]:
    """Every request of a plan, in the order of their ends in a closed loop, of their arrivals in an open one."""
    async with sender(plan) as send:
        return await (open_loop if plan.rate else closed_loop)(send, plan)


# ---- figures -----------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of all do not exceed; not a number where there are none."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)] if values else math.nan


def within(records: Sequence[Record], start: float, end: float) -> list[Record]:
    """Those that ended well in a stretch of time, its end left out. In a steady closed loop, so many were served."""
    return [record for record in records if record.status == OK and start <= record.ended < end]


def due_within(records: Sequence[Record], start: float, end: float) -> list[Record]:
    """Those that were due in a stretch of time and ended well, whenever that was: of an open loop."""
    return [record for record in records if record.status == OK and start <= record.due < end]


def main() -> None:
    """Run the plan on stdin; print records, and the share of one core that this process used."""
    values = json.load(sys.stdin)
    plan = Plan(**{**values, "steps": tuple(values["steps"])})
    wall, used = perf_counter(), process_time()
    records = asyncio.run(run(plan))
    share = (process_time() - used) / (perf_counter() - wall)
    answer: dict[str, Any] = {"records": [asdict(record) for record in records], "cpu_share": share}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
