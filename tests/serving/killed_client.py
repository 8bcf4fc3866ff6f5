"""The client of a server that is killed again and again: it keeps a ledger of what it was promised."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import runtimes
from runtimes.serving.engine.contract import Generated
from runtimes.serving.state.order import Order, Output
from runtimes.serving.state.store import ENDED
from runtimes.serving.state.written_images import written

VARIANTS = 8  # of images: each is computed alone once, however many jobs ask for it


class Client:
    """Posts jobs with idempotency keys, and follows them.

    Attributes:
        accepted: id to the number that its request was made of, of every id that was returned.
        deleted: ids that it asked to end.
        ends: id to the status that it saw at the end.
    """

    def __init__(self, ledger: Path, seed: int) -> None:
        """An empty ledger."""
        self._chance = random.Random(seed)
        self._file = ledger.open("a", encoding="utf-8")
        self.accepted: dict[str, int] = {}
        self.deleted: set[str] = set()
        self.ends: dict[str, str] = {}
        self._unanswered: dict[str, int] = {}
        self._keys: dict[str, str] = {}

    def post(self, port: int) -> None:
        """One job: a new one, or an earlier one again, answered or not.

        Raises:
            OSError: the server died.
            ValueError: it gave another answer than it must.
        """
        kind = self._chance.random()
        if self._unanswered and kind < 0.5:
            key, number = self._chance.choice(list(self._unanswered.items()))
        elif self._keys and kind < 0.6:
            key = self._chance.choice(list(self._keys))
            number = self.accepted[self._keys[key]]
        else:
            key, number = f"{self._chance.getrandbits(64):x}", self._chance.getrandbits(40)
            self._unanswered[key] = number
            self._note(asked=key, number=number)
        status, answer = self._call(port, "POST", "/v1/jobs", body_of(number), {"Idempotency-Key": key})
        if status == 503:
            return
        if status != 202:
            raise ServerFault(f"POST gave {status}: {answer!r:.300}")
        identity = json.loads(answer)["id"]
        if self._keys.setdefault(key, identity) != identity and self._keys[key] not in self.deleted:
            raise ServerFault(f"the key {key} gave {self._keys[key]} and {identity}")
        self._keys[key] = identity
        self.accepted[identity] = number
        self._unanswered.pop(key, None)
        self._note(accepted=identity, key=key)

    def post_again(self, port: int) -> None:
        """Everything that was asked and never answered."""
        while self._unanswered:
            key, number = next(iter(self._unanswered.items()))
            status, answer = self._call(port, "POST", "/v1/jobs", body_of(number), {"Idempotency-Key": key})
            if status != 202:
                raise ServerFault(f"POST gave {status}: {answer!r:.300}")
            identity = json.loads(answer)["id"]
            self.accepted[identity], self._keys[key] = number, identity
            del self._unanswered[key]
            self._note(accepted=identity, key=key)

    def look(self, port: int) -> None:
        """At one of the jobs; a few are cancelled, or forgotten where they have ended."""
        identity = self._chance.choice(list(self.accepted))
        if self._chance.random() < 0.05:
            self.deleted.add(identity)
            self._note(deleted=identity)
            self._call(port, "DELETE", f"/v1/jobs/{identity}")
        elif (job := self.job(port, identity)) is not None and job["status"] in ENDED:
            if self.ends.setdefault(identity, job["status"]) != job["status"]:
                raise ServerFault(f"{identity} was {self.ends[identity]} and is {job['status']}")
            self._note(ended=identity, status=job["status"])

    def job(self, port: int, identity: str) -> dict[str, Any] | None:
        """A job as the server has it; None where it has none."""
        status, answer = self._call(port, "GET", f"/v1/jobs/{identity}")
        if status == 404:
            return None
        if status != 200:
            raise ServerFault(f"GET gave {status}: {answer!r:.300}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def images(self, port: int, job: Mapping[str, Any]) -> list[bytes]:
        """The files of a completed job."""
        return [self._call(port, "GET", f"/v1/images/{image['sha256']}.{image['kind']}")[1] for image in job["images"]]

    def file_of(self, identity: str) -> bytes | None:
        """The file that was sent with a job."""
        return sent_file(self.accepted[identity])

    def _call(self, port: int, method: str, path: str, body: Mapping[str, Any] | None = None,
              headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError("the answer is not whole") from error
        finally:
            connection.close()

    def _note(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class ServerFault(Exception):
    """The server gave an answer that it must never give."""


def body_of(number: int) -> dict[str, Any]:
    """The body of one of the requests; every other one sends an image, in a file that no other one sends."""
    kind = number % VARIANTS
    body = {"prompt": f"a red apple {kind}", "seed": 100 + kind, "num_inference_steps": 2 + kind % 3, "n": 1}
    content = sent_file(number)
    if content is not None:
        body |= {"image": base64.b64encode(content).decode(), "strength": 0.8}
    return body


def sent_file(number: int) -> bytes | None:
    """The image that comes with a request."""
    if number % 2:
        return None
    file, said = io.BytesIO(), PngInfo()
    said.add_text("number", str(number))
    pixels = Image.linear_gradient("L").resize((64, 64)).rotate(30 * (number % VARIANTS)).convert("RGB")
    pixels.save(file, "PNG", pnginfo=said)
    return file.getvalue()


class LoneRuns:
    """The same requests in this process, each by itself."""

    def __init__(self, bundle: Path) -> None:
        """Load the bundle."""
        self._pipeline, self._known = runtimes.load(bundle), dict[str, Any]()

    def differences(self, job: Mapping[str, Any], file: bytes | None, images: list[bytes]) -> list[str]:
        """What is wrong with the images of a completed job."""
        fields = {key: value for key, value in job["request"].items() if key not in ("output", "files")}
        order = Order("emoji", fields, {} if file is None else {"image": (file,)}, Output(**job["request"]["output"]))
        key = json.dumps(fields, sort_keys=True)  # the prompt names the pixels that were sent
        if key not in self._known:
            self._known[key] = self._pipeline(order.request())
        expected = [image.content for image in written(Generated(self._known[key], job["digest"]), order)]
        if images != expected:
            return [f"{job['id']}: its images are not those of its lone run"]
        return [f"{job['id']}: {said['sha256']} is not its hash" for said, content in
                zip(job["images"], images, strict=True) if hashlib.sha256(content).hexdigest() != said["sha256"]]
