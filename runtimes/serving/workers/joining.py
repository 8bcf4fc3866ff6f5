"""How a server and engines of other machines find each other over TCP, and know that each has the key.

The key answers a challenge of either side (`multiprocessing.connection`); it is never sent. What follows is neither
encrypted nor signed: join within a private network, or through a tunnel.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import answer_challenge, deliver_challenge
from multiprocessing.context import AuthenticationError
from pathlib import Path

from runtimes.errors import InputError, UnavailableError
from runtimes.serving.workers.channel import Channel

logger = logging.getLogger(__name__)
CHALLENGE_SECONDS = 5.0
MOST_STRANGERS = 16  # that are asked for the key at once; others are hung up on
LEAST_KEY_BYTES = 16
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, times


def read_key(file: str | Path, where: str = "--engine-key-file") -> bytes:
    """The key in a file: its content without surrounding white space.

    Raises:
        InputError: it cannot be read, or is short enough to be guessed.
    """
    try:
        key = Path(file).read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", where=where, fix="write a key into a file: "
                         "python -c 'import secrets; print(secrets.token_hex(32))'") from error
    if len(key) < LEAST_KEY_BYTES:
        raise InputError(f"the key has {len(key)} bytes", where=where, fix=f"at least {LEAST_KEY_BYTES}; make one by "
                         "python -c 'import secrets; print(secrets.token_hex(32))'")
    return key


class Listener:
    """Takes connections of engines that have the key. A stranger holds up nobody."""

    def __init__(self, host: str, port: int, key: bytes, on_join: Callable[[Channel, str], None], *,
                 challenge_seconds: float = CHALLENGE_SECONDS) -> None:
        """Listen from now on.

        Args:
            host: address to listen on.
            port: 0 takes a free one, see `port`.
            key: that both sides have.
            on_join: called in a thread of its own with the connection and the other side's address.
            challenge_seconds: in which the other side must have answered.

        Raises:
            UnavailableError: the port is taken.
        """
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}", where="--engine-port",
                                   fix="choose another port") from error
        self._key, self._on_join, self._seconds = key, on_join, challenge_seconds
        self._strangers = threading.Semaphore(MOST_STRANGERS)
        self._thread = threading.Thread(target=self._accept, name="engines join", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """That it listens on."""
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Take no more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                stream, address = self._socket.accept()
            except OSError:
                return
            if not self._strangers.acquire(blocking=False):
                stream.close()
                continue
            threading.Thread(target=self._ask, args=(stream, address[0]), name="engine joins", daemon=True).start()

    def _ask(self, stream: socket.socket, address: str) -> None:
        channel = Channel(stream)
        try:
            _prepare(stream)
            _challenge(channel, self._key, self._seconds, first=True)
        except (OSError, EOFError, AuthenticationError, AssertionError) as error:
            logger.warning("an engine at %s could not join: it does not have the key (%s)", address, error)
            channel.release()
            return
        finally:
            self._strangers.release()
        self._on_join(channel, address)


def connect(host: str, port: int, key: bytes, seconds: float = CHALLENGE_SECONDS) -> Channel:
    """Join a server.

    Raises:
        InputError: the server has another key.
        OSError, EOFError: it cannot be reached, or hung up.
    """
    stream = socket.create_connection((host, port), seconds)
    channel = Channel(stream)
    try:
        _prepare(stream)
        _challenge(channel, key, seconds, first=False)
    except (AuthenticationError, AssertionError) as error:  # the latter is how Python 3.11 refuses a greeting
        channel.release()
        raise InputError(f"the server at {host}:{port} has another key", where="--engine-key-file",
                         fix="give both sides the same file") from error
    except BaseException:
        channel.release()
        raise
    return channel


def _prepare(stream: socket.socket) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _challenge(channel: Channel, key: bytes, seconds: float, *, first: bool) -> None:
    """Both sides prove that they have the key; whoever takes too long is hung up on."""
    timer = threading.Timer(seconds, channel.close)
    timer.start()
    try:
        for ask in (first, not first):
            (deliver_challenge if ask else answer_challenge)(channel.connection, key)
    finally:
        timer.cancel()
