"""API keys with their rates, and signed addresses of images."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runtimes.errors import InputError
from runtimes.serving.http.failures import HttpError

KEY_FILE = "signing.key"
KEY_BYTES = 32
LEAST_KEY = 16  # characters: a shorter one can be guessed
HOUR = 3600


class KeyRing:
    """The keys that open the server, by the names of their owners. Without keys everybody is the owner ""."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        """Hold keys by owner."""
        self._hashes = [(owner, _hash(key)) for owner, key in (keys or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    @classmethod
    def read(cls, file: str | Path) -> KeyRing:
        """One key a line, each NAME:KEY or KEY; empty lines and those that begin with # are comments.

        Raises:
            InputError: unreadable, without a key, with a short one, or with one name or key twice.
        """
        where = str(file)
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("the file of keys cannot be read", where=where, fix="give a text file") from error
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not (text := line.strip()) or text.startswith("#"):
                continue
            name, colon, key = text.partition(":")
            name, key = (name, key) if colon else (f"key-{_hash(text).hex()[:8]}", text)
            if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"the key of line {number} is not {LEAST_KEY} or more ASCII characters without "
                                 "blanks", where=where, fix="openssl rand -hex 24")
            if not name or name in keys or key in keys.values():
                raise InputError(f"line {number} has no name, or a name or key for the second time", where=where)
            keys[name] = key
        if not keys:
            raise InputError("no key in it", where=where, fix="write NAME:KEY in a line")
        return cls(keys)

    def owner(self, authorization: str | None) -> str:
        """Whose key an Authorization header holds: `Bearer KEY`, or `Basic` with the key as its password.

        Every key is compared in constant time, and all of them whichever fits.

        Raises:
            HttpError: 401: no key, or one that nobody has.
        """
        if not self._hashes:
            return ""
        given, found = _hash(_key_in(authorization)), None
        for owner, known in self._hashes:
            if hmac.compare_digest(given, known):
                found = owner
        if found is None:
            raise HttpError(401, "no key, or one that this server does not know", code="invalid_api_key",
                            fix="send Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        return found


class RateLimiter:
    """So many images a minute for each owner: a bucket that fills evenly and holds a minute's worth."""

    def __init__(self, images_per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        """0 limits nothing."""
        self._rate, self._clock = images_per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, owner: str, images: int) -> None:
        """Count images that an owner asks for.

        Raises:
            HttpError: 429 with the time after which there is room for them; 400 for more than a minute's worth.
        """
        if not self._rate:
            return
        if images > self._rate:
            raise HttpError(400, f"{images} images are more than the {self._rate:g} that a key may ask for in a minute",
                            code="invalid_value", where="n")
        with self._lock:
            now = self._clock()
            level, since = self._buckets.get(owner, (self._rate, now))
            level = min(level + (now - since) * self._rate / 60, self._rate)
            if level < images:
                seconds = max(math.ceil((images - level) * 60 / self._rate), 1)
                raise HttpError(429, f"this key may ask for {self._rate:g} images a minute", code="rate_limit_exceeded",
                                fix=f"ask again in {seconds} seconds", headers={"Retry-After": str(seconds)})
            self._buckets[owner] = (level - images, now)


class Signer:
    """Addresses of images that nobody can guess: an HMAC over the image and the hour until which it holds."""

    def __init__(self, key: bytes, *, hours: float = 168.0, clock: Callable[[], float] = time.time) -> None:
        """Sign with a key; signatures hold for at least so many hours."""
        self._key, self._seconds, self._clock = key, max(hours, 1.0) * HOUR, clock

    @classmethod
    def of(cls, state: Path, *, hours: float = 168.0) -> Signer:
        """With the key of a state folder, made at the first use and readable by its owner alone."""
        file = state / KEY_FILE
        state.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            partial = state / f"{KEY_FILE}.{secrets.token_hex(4)}.partial"
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(KEY_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(file)
        key = file.read_bytes()
        if len(key) != KEY_BYTES:
            raise InputError("the key that signs image addresses is damaged", where=str(file),
                             fix="remove it; addresses given before end to work")
        return cls(key, hours=hours)

    def query(self, name: str) -> str:
        """The signed query of an image's address; the same for an hour, so that caches can be of use."""
        until = math.ceil((self._clock() + self._seconds) / HOUR) * HOUR
        return f"until={until}&signature={self._signature(name, until)}"

    def check(self, name: str, until: str, signature: str) -> float:
        """For how many more seconds an address holds.

        Raises:
            HttpError: 403: a wrong signature, or one that holds no more.
        """
        holds = int(until) if until.isascii() and until.isdecimal() and len(until) < 16 else 0
        expected = self._signature(name, holds)
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise HttpError(403, "the address of this image is not signed by this server", code="forbidden",
                            fix="ask for the job again, which has a signed one")
        if (left := holds - self._clock()) <= 0:
            raise HttpError(403, "the address of this image has expired", code="expired",
                            fix="ask for the job again, which has a new one")
        return left

    def _signature(self, name: str, until: int) -> str:
        digest = hmac.new(self._key, f"{name}\n{until}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def loopback_host(host: str, allowed: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")) -> bool:
    """Whether a Host header names this machine itself.

    >>> loopback_host("localhost:8000"), loopback_host("evil.example")
    (True, False)
    """
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower() in allowed


def _hash(key: str) -> bytes:
    """Keys are compared by their hashes, which all have one length."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _key_in(authorization: str | None) -> str:
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode("utf-8", "replace").partition(":")[2]
        except ValueError:
            return ""
    return ""
