"""Messages between a server and its workers: JSON with arrays beside it, over a connection that may be a stranger's.

A message is a header of JSON and the bytes of each array in a frame of its own: nothing in it is ever executed, and
what is larger, longer or of another kind than the header may say is refused before it is read.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import UnavailableError

PROTOCOL = 1
MOST_HEADER_BYTES, MOST_ARRAYS, MOST_ARRAY_BYTES, MOST_DIMENSIONS = 8 << 20, 256, 1 << 30, 6
DTYPES = ("uint8", "int32", "int64", "float16", "float32", "float64")
T = TypeVar("T")


class ProtocolError(UnavailableError):
    """What came is no message of ours."""

    def __init__(self, what: str) -> None:
        """Say what is wrong with it."""
        super().__init__(what, where="worker", fix="run the same version of ldm-deploy on both sides")


@dataclass(frozen=True)
class Message:
    """What one side tells the other.

    Attributes:
        kind: what it is about.
        fields: JSON-able.
        arrays: pixels or latents, of the dtypes in `DTYPES` and any shape.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Sequence[NDArray[Any]] = ()

    def get(self, name: str, kind: type[T]) -> T:
        """A field that must be there and of a type; a whole number does for a float.

        Raises:
            ProtocolError: it is not.
        """
        value = self.fields.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ProtocolError(f"{self.kind} has {name} {value!r:.60}, expected {kind.__name__}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """A field that must be an object of texts.

        Raises:
            ProtocolError: it is not.
        """
        found = self.get(name, dict)
        if not all(type(text) is str for text in found.values()):
            raise ProtocolError(f"{self.kind} has in {name} what is no text")
        return found


class Channel:
    """Sends and receives messages. One thread may receive while others send."""

    def __init__(self, stream: socket.socket) -> None:
        """Take over a connected socket."""
        stream.setblocking(True)
        self._stream = stream
        self._connection = Connection(os.dup(stream.fileno()))  # each closes a number of its own
        self._sending, self._closing = threading.Lock(), threading.Lock()
        self._closed = False

    @property
    def connection(self) -> Connection:
        """For the challenge of `multiprocessing.connection`, before the first message."""
        return self._connection

    def send(self, message: Message) -> None:
        """Write a message; waits until the other side has room for it.

        Raises:
            OSError: the other side is gone.
        """
        arrays = [np.asarray(array, array.dtype.newbyteorder("<"), order="C") for array in message.arrays]
        header = {"protocol": PROTOCOL, "kind": message.kind, "fields": message.fields,
                  "arrays": [[array.dtype.name, array.shape] for array in arrays]}
        text = json.dumps(header, allow_nan=False).encode("ascii")
        with self._sending:
            self._connection.send_bytes(text)
            for array in arrays:
                if array.nbytes:
                    self._connection.send_bytes(array.data.cast("B"))

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            ProtocolError: what came is none.
            OSError, EOFError: the other side is gone.
        """
        try:
            header = json.loads(self._frame(MOST_HEADER_BYTES))
            if header["protocol"] != PROTOCOL:
                raise ProtocolError(f"the other side speaks version {header['protocol']!r:.20}, this one {PROTOCOL}")
            kind, fields, described = header["kind"], header["fields"], header["arrays"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError("what came is no message") from error
        if type(kind) is not str or type(fields) is not dict or type(described) is not list:
            raise ProtocolError("what came is no message")
        return Message(kind, fields, [self._array(*one) for one in _described(described)])

    def close(self) -> None:
        """End both directions; a thread that receives is woken by it. Closing again does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give back the socket, once no thread reads or writes any more."""
        self.close()
        with suppress(OSError):
            self._stream.close()
            self._connection.close()

    def _array(self, dtype: str, shape: tuple[int, ...], size: int) -> NDArray[Any]:
        if not size:
            return np.empty(shape, dtype)
        content = self._frame(size)
        if len(content) != size:
            raise ProtocolError(f"an array has {len(content)} bytes, its header says {size}")
        return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)

    def _frame(self, most: int) -> bytes:
        try:
            return self._connection.recv_bytes(most)
        except OSError as error:
            if self._connection.closed or not str(error).startswith("bad message length"):
                raise
            raise ProtocolError(f"a frame is longer than {most} bytes") from error


def _described(described: Sequence[Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """Name of the dtype, shape and bytes of each array, all together within the limits."""
    if len(described) > MOST_ARRAYS:
        raise ProtocolError(f"{len(described)} arrays in one message")
    found, total = [], 0
    for one in described:
        try:
            dtype, shape = one
            fits = dtype in DTYPES and type(shape) is list and len(shape) <= MOST_DIMENSIONS and all(
                type(size) is int and 0 <= size <= MOST_ARRAY_BYTES for size in shape)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ProtocolError(f"{one!r:.80} is no dtype and shape")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        total += size
        if total > MOST_ARRAY_BYTES:
            raise ProtocolError(f"the arrays of one message have more than {MOST_ARRAY_BYTES} bytes")
        found.append((dtype, tuple(shape), size))
    return found
