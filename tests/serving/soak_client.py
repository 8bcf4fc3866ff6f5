"""What the clients of a soak do, one action after another, and what each must be answered; all of it in a ledger."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
from PIL import Image

from runtimes.inputs.image_texts import texts_of
from tests.serving.ledger import ENDS, Ledger
from tests.serving.load_client import OK
from tests.serving.soak_requests import BAD_BODIES, Wanted, digest, wanted

ACCEPTED, TOO_MANY = 202, 429
GENERATIONS, EDITS, JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/jobs"
JOB_SECONDS = 120.0


class Client:
    """One client: it acts until it is asked to stop. Several share a ledger and a connection pool."""

    def __init__(self, http: httpx.AsyncClient, ledger: Ledger, numbers: Callable[[], int], seed: int) -> None:
        """Not started.

        Args:
            http: with the server's address as its base.
            ledger: receives everything.
            numbers: of the next requests.
            seed: of what it does.
        """
        self.http, self.ledger, self.numbers, self.chance = http, ledger, numbers, random.Random(seed)
        self.actions: dict[Callable[[], Awaitable[None]], float] = {
            self.generate: 40, self.by_address: 6, self.stream: 14, self.edit: 10, self.job: 12, self.bad_body: 6,
            self.leave: 5, self.leave_stream: 3, self.cancel_job: 4}

    async def run(self, until: Callable[[], bool]) -> None:
        """Act until then."""
        while not until():
            action, = self.chance.choices([*self.actions], [*self.actions.values()])
            try:
                await action()
            except httpx.HTTPError as error:
                self.ledger.fault(f"{action.__name__}: no answer: {type(error).__name__} {error}")
                await asyncio.sleep(0.5)
            except Exception as error:
                self.ledger.fault(f"{action.__name__}: an answer that cannot be read: {type(error).__name__} {error}")

    # ---- that end with images ------------------------------------------------------------------------------------

    async def generate(self) -> None:
        """A request whose answer is waited for."""
        request = self._next(edit=False)
        answer = await self.http.post(GENERATIONS, json={**request.body(), "response_format": "b64_json"})
        if await self._went_well("generate", request, answer):
            self._images("generate", request, [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]])

    async def by_address(self) -> None:
        """The same, with addresses of the images, which are fetched."""
        request = self._next(edit=False)
        answer = await self.http.post(GENERATIONS, json={**request.body(), "response_format": "url"})
        if await self._went_well("by_address", request, answer):
            self._images("by_address", request, [await self._fetched(image["url"]) for image in answer.json()["data"]])

    async def stream(self) -> None:
        """The same, with previews: as many as asked for where there are steps enough, before each image."""
        request, partial = self._next(edit=False, count=1), self.chance.randint(0, 3)
        body = {**request.body(), "stream": True, "partial_images": partial}
        async with self.http.stream("POST", GENERATIONS, json=body) as answer:
            if answer.status_code != OK:
                await answer.aread()
            if not await self._went_well("stream", request, answer):
                return
            kinds, images = [], []
            async for event in events(answer):
                kinds.append(event["type"].rpartition(".")[2])
                images += [base64.b64decode(event["b64_json"])] if kinds[-1] == "completed" else []
        if kinds != ["partial_image"] * min(partial, request.steps - 1) + ["completed"]:
            self.ledger.fault(f"stream of {request.number}: {request.steps} steps, {partial} asked for, got {kinds}")
        self._images("stream", request, images)

    async def edit(self) -> None:
        """An image that is edited, with or without a mask."""
        request = self._next(edit=True)
        fields = {name: str(value) for name, value in request.body().items()}
        answer = await self.http.post(EDITS, data={**fields, "response_format": "b64_json"}, files=request.files())
        if await self._went_well("edit", request, answer):
            self._images("edit", request, [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]])

    async def job(self) -> None:
        """A job that is waited for; now and then it is sent twice under one key."""
        request, headers = self._next(edit=self.chance.random() < 0.2), {}
        if twice := self.chance.random() < 0.3:
            headers["Idempotency-Key"] = f"key-{self.chance.getrandbits(64)}"
        identity = await self._accepted("job", request, headers)
        if identity is None:
            return
        if twice and await self._accepted("job again", request, headers, known=True) not in (identity, None):
            self.ledger.fault(f"job {identity}: its idempotency key gave another job")
        await self.follow(identity, request)

    async def follow(self, identity: str, request: Wanted) -> None:
        """Wait for a job's end, and take its images."""
        answer: dict[str, Any] = {}
        for _ in range(int(JOB_SECONDS / 0.2)):
            answer = (await self.http.get(f"{JOBS}/{identity}")).json()
            if answer["status"] in ENDS:
                break
            await asyncio.sleep(0.2)
        self.ledger.job_ended(identity, answer["status"])
        if answer["status"] == "completed":
            self._images("job", request, [await self._fetched(image["url"]) for image in answer["images"]])
        else:
            self.ledger.end("job", answer["status"], request.number, str(answer.get("reason")))
            self.ledger.fault(f"job {identity} that nobody cancelled: {answer['status']}, {answer.get('reason')}")

    # ---- that do not ---------------------------------------------------------------------------------------------

    async def bad_body(self) -> None:
        """What must be refused with an error that says why, and without work."""
        body = self.chance.choice(BAD_BODIES)
        answer = await self.http.post(GENERATIONS, content=body, headers={"Content-Type": "application/json"})
        self._count(answer)
        if 400 <= answer.status_code < 500 and answer.json()["error"]["message"]:
            self.ledger.end("bad_body", "refused", -1)
        else:
            self.ledger.fault(f"bad body {body!r}: {answer.status_code} {answer.text[:200]}")

    async def leave(self) -> None:
        """A client that hangs up before its answer."""
        await self._abandoned("leave", {**self._next(edit=False).body(), "response_format": "b64_json"})

    async def leave_stream(self) -> None:
        """A client that hangs up in the middle of a stream."""
        await self._abandoned("leave_stream", {**self._next(edit=False).body(), "stream": True, "partial_images": 3})

    async def cancel_job(self) -> None:
        """A job that is cancelled while it waits or runs, or a moment after it ended."""
        request = self._next(edit=False)
        identity = await self._accepted("cancel_job", request, {})
        if identity is None:
            return
        await asyncio.sleep(self.chance.uniform(0, 0.6))
        seen = (await self.http.get(f"{JOBS}/{identity}")).json()
        answer = await self.http.delete(f"{JOBS}/{identity}")
        self._count(answer)
        status = answer.json()["status"]
        if seen["status"] in ENDS:  # ended by itself; DELETE then forgets it
            status = seen["status"]
        if status not in ("cancelled", "completed"):
            self.ledger.fault(f"job {identity} that was cancelled: {status}")
        self.ledger.job_ended(identity, status)
        self.ledger.end("cancel_job", status, request.number)

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _next(self, *, edit: bool, count: int | None = None) -> Wanted:
        """The next request that is an edit, or none; numbers of the other kind are left out."""
        while True:
            request = wanted(self.numbers())
            if bool(request.edit) == edit and count in (None, request.count):
                return request

    def _count(self, answer: httpx.Response) -> None:
        self.ledger.statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            self.ledger.fault(f"{answer.status_code} of {answer.request.url.path}: {answer.text[:300]}")

    async def _went_well(self, action: str, request: Wanted, answer: httpx.Response, expected: int = OK) -> bool:
        """Whether a request was accepted; one that was refused since the queue is full waits as it is asked to."""
        self._count(answer)
        if answer.status_code == expected:
            return True
        if answer.status_code == TOO_MANY and answer.headers.get("retry-after", "").isdecimal():
            self.ledger.end(action, "refused: full", request.number)
            await asyncio.sleep(min(float(answer.headers["retry-after"]), 2.0))
        elif answer.status_code < 500:
            self.ledger.fault(f"{action} of {request.number}: {answer.status_code} {answer.text[:300]}")
        return False

    def _images(self, action: str, request: Wanted, files: list[bytes]) -> None:
        if len(files) != request.count:
            self.ledger.fault(f"{action} of {request.number}: {len(files)} images for {request.count}")
        for place, file in enumerate(files):
            said = texts_of(Image.open(io.BytesIO(file)))
            if (said.get("prompt"), said.get("seed")) != (request.prompt, str(request.seed + place)):
                self.ledger.fault(f"{action} of {request.number}: a file that says {said}")
        self.ledger.made(request.number, [digest(file) for file in files])
        self.ledger.end(action, "completed", request.number)

    async def _fetched(self, address: str) -> bytes:
        answer = await self.http.get(address)
        self._count(answer)
        if answer.status_code != OK:
            self.ledger.fault(f"an image's address: {answer.status_code} {answer.text[:200]}")
        return answer.content

    async def _accepted(self, action: str, request: Wanted, headers: dict[str, str], *, known: bool = False,
                        ) -> str | None:
        body = request.body()
        if request.edit:
            body |= {name: base64.b64encode(content).decode() for name, (_, content, _) in request.files().items()}
        answer = await self.http.post(JOBS, json=body, headers=headers)
        if not await self._went_well(action, request, answer, ACCEPTED):
            return None
        identity: str = answer.json()["id"]
        self.ledger.accept(identity, request.number, again=known)
        return identity

    async def _abandoned(self, action: str, body: dict[str, Any]) -> None:
        async def ask() -> None:
            async with self.http.stream("POST", GENERATIONS, json=body) as answer:
                self.ledger.statuses[answer.status_code] += 1
                async for _ in answer.aiter_bytes():
                    pass

        with suppress(TimeoutError):
            await asyncio.wait_for(ask(), self.chance.uniform(0.005, 0.4))
        self.ledger.end(action, "left", -1)


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The data of server-sent events, each a JSON object."""
    data: list[str] = []
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            if data != ["[DONE]"]:
                yield json.loads("\n".join(data))
            data = []
