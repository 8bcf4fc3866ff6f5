"""Engines of other machines: they join with the key, serve what they have, and strangers stall nobody."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtimes.errors import CancelledError, InputError, UnavailableError
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.workers.joining import connect, read_key
from runtimes.serving.workers.pool import WorkerPool
from tests.serving.test_pool import request, wait_for
from tests.serving.tiny_bundles import copied, tiny_bundle

KEY = b"a key that nobody else has"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("remote") / "m")


@pytest.fixture(scope="module")
def catalog(bundle) -> Catalog:
    return Catalog([bundle])


@contextmanager
def joined(port: int, key_file: Path, *bundles: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "runtimes.serving.workers.engine_process", "--join", f"127.0.0.1:{port}",
               "--key-file", str(key_file), "--workers", "1", *map(str, bundles)]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def key_file(tmp_path) -> Path:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    return tmp_path / "key"


def listening(catalog: Catalog, **more) -> WorkerPool:
    return WorkerPool(catalog, [], reload_seconds=0, listen=("127.0.0.1", 0, KEY), **more)


def test_an_engine_joins_with_the_key_is_used_and_missed_when_it_dies(bundle, catalog, key_file):
    with listening(catalog) as one:
        assert one.listener is not None
        with joined(one.listener.port, key_file, bundle) as process:
            assert one.wait_until_ready(60)
            result = one.submit(request(), "m").result(60)
            assert result.digest == catalog["m"].digest and result.images.shape == (1, 32, 32, 3)
            assert [worker.alive for worker in one.status().workers] == [True]
            long = one.submit(request(steps=999, images_per_prompt=8), "m")
            wait_for(lambda: long.progress is not None)
            process.kill()
            wait_for(lambda: one.status().workers == ())
            assert long.status == "queued"
        with joined(one.listener.port, key_file, bundle):
            wait_for(lambda: long.status == "running", 60)
            long.cancel()
            with pytest.raises(CancelledError):
                long.result(20)


def test_an_engine_with_another_bundle_gets_none_of_its_requests(bundle, catalog, key_file, tmp_path):
    other = copied(bundle, tmp_path / "m", "another build")
    with listening(catalog) as one:
        assert one.listener is not None
        with joined(one.listener.port, key_file, other):
            assert one.wait_until_ready(60)
            ticket = one.submit(request(), "m", deadline_seconds=0.5)
            with pytest.raises(UnavailableError, match="deadline"):
                ticket.result(20)


def test_an_engine_with_another_key_is_refused_and_says_so(bundle, catalog, tmp_path):
    (tmp_path / "wrong").write_text("some other key, long enough")
    with listening(catalog) as one:
        assert one.listener is not None
        with pytest.raises(InputError, match="has another key"):
            connect("127.0.0.1", one.listener.port, b"some other key, long enough")
        with joined(one.listener.port, tmp_path / "wrong", bundle) as process:
            assert process.wait(60) == 2
        assert one.status().workers == ()


def test_strangers_stall_nobody(bundle, catalog, key_file):
    with listening(catalog) as one:
        assert one.listener is not None
        strangers = [socket.create_connection(("127.0.0.1", one.listener.port)) for _ in range(40)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        strangers[1].sendall(b"\x7f\xff\xff\xff")
        wait_for(lambda: hung_up(strangers[0]) and hung_up(strangers[1]))
        wait_for(lambda: all(map(hung_up, strangers)), 20)  # the others took too long
        channel = connect("127.0.0.1", one.listener.port, KEY)
        channel.connection.send_bytes(b"no message")
        wait_for(lambda: one.status().workers == ())
        channel.release()
        for stranger in strangers:
            stranger.close()


def hung_up(stream: socket.socket) -> bool:
    """Whether the other side has closed; what it said before is read."""
    stream.settimeout(0.01)
    try:
        return stream.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_key_that_could_be_guessed_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "short").write_text("secret\n")
    for file, match in ((tmp_path / "short", "6 bytes"), (tmp_path / "none", "cannot read")):
        with pytest.raises(InputError, match=match):
            read_key(file)
