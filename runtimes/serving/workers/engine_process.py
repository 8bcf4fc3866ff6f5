"""The process of one worker.

    python -m runtimes.serving.workers.engine_process --fd 7        # as `WorkerPool` starts it
    python -m runtimes.serving.workers.engine_process --join HOST:PORT --key-file FILE BUNDLE...    # on another machine
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from runtimes.errors import DeployError, InputError
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.engine.models import Models
from runtimes.serving.logs import set_up_logs
from runtimes.serving.options import LOG_FORMATS, EngineOptions
from runtimes.serving.workers.channel import Channel, Message, ProtocolError
from runtimes.serving.workers.connected_engine import ConnectedEngine, Offer, WorkerOptions, loaded_by, offers_of
from runtimes.serving.workers.joining import connect, read_key
from runtimes.serving.workers.placement import placed

logger = logging.getLogger(__name__)
MODULE = "runtimes.serving.workers.engine_process"
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 1.0, 30.0


def work(fd: int) -> None:
    """Work for the process that started this one, and end with it.

    Signals are the parent's to answer: what Ctrl-C or a stop of the service sends to the whole group must not end a
    worker before the requests that the parent drains.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    with suppress(OSError, EOFError):  # the parent is gone: nobody waits for what runs
        start = channel.receive()
        options = WorkerOptions.from_message(start)
        set_up_logs(options.log_format)
        ConnectedEngine(channel, options, offers_of(start)).run()
    sys.stderr.flush()
    os._exit(0)  # a network that is still computing is not waited for


def join(server: str, bundles: Sequence[str], options: EngineOptions) -> None:
    """Run engines for a server of another machine, until interrupted: one process for each device or group of cores.

    Args:
        server: HOST:PORT, the port being the server's `--engine-port`.
        bundles: as the server serves them: what has another name or digest is not asked for.
        options: of `serve-engine`.

    Raises:
        InputError: an address, bundle, device or key that cannot be used; the server has another key.
    """
    host, port = _address(server)
    key = read_key(options.engine_key_file)
    places = placed(options)
    catalog = Catalog(bundles, device=options.device.split(",")[0], deterministic=options.deterministic)
    if len(places) == 1:
        _Joined(host, port, key, catalog, places[0]).run(options.reload_seconds)
        return
    arguments = [sys.executable, "-m", MODULE, "--join", server, "--key-file", options.engine_key_file,
                 "--reload-seconds", str(options.reload_seconds), *bundles]
    children: list[subprocess.Popen[bytes] | None] = [None] * len(places)
    pause = threading.Event()
    try:
        while True:
            for i, child in enumerate(children):
                if child is not None and child.poll() == InputError.exit_code:
                    raise InputError("an engine was refused", where=server, fix="see the line before")
                if child is None or child.poll() is not None:
                    children[i] = subprocess.Popen([*arguments, "--place", str(i), *_again(options)])
            pause.wait(AGAIN_SECONDS)
    finally:
        for child in filter(None, children):
            child.terminate()
            child.wait()


class _Joined:
    """One engine that joins a server, again whenever the connection ends; what it has loaded stays loaded."""

    def __init__(self, host: str, port: int, key: bytes, catalog: Catalog, options: WorkerOptions) -> None:
        self._host, self._port, self._key, self._catalog = host, port, key, catalog
        self._options = options
        self._offers = {name: Offer.of(model) for name, model in catalog.items()}
        self._engine: ConnectedEngine | None = None

    def run(self, reload_seconds: float) -> None:
        """Join and work for ever.

        Raises:
            InputError: the server has another key.
        """
        models = loaded_by(self._options, self._offers)
        if reload_seconds:
            threading.Thread(target=self._reload, args=(reload_seconds,), name="reload", daemon=True).start()
        pause, wait = threading.Event(), AGAIN_SECONDS
        while True:
            try:
                self._work(models)
                wait = AGAIN_SECONDS
            except (OSError, EOFError, ProtocolError) as error:
                logger.warning("not joined to %s:%d: %s; again in %.0f s", self._host, self._port,
                               str(error) or "it hung up", wait)
            pause.wait(wait)
            wait = min(2 * wait, MOST_AGAIN_SECONDS)

    def _work(self, models: Models) -> None:
        channel = connect(self._host, self._port, self._key)
        logger.info("joined %s:%d", self._host, self._port)
        self._engine = ConnectedEngine(channel, self._options, self._offers, models)
        self._engine.run()

    def _reload(self, seconds: float) -> None:
        pause = threading.Event()
        while not pause.wait(seconds):
            if self._catalog.refresh():
                self._offers.update({name: Offer.of(model) for name, model in self._catalog.items()})
                if (engine := self._engine) is not None:
                    engine.say(Message("digests", {"digests": engine.digests()}))


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{server!r} is no address", where="server", fix="give HOST:PORT, as 10.0.0.1:9000")
    return host.strip("[]"), int(port)


def _again(options: EngineOptions) -> list[str]:
    """The options of a place, for the process that runs it."""
    given = ["--device", options.device, "--workers", str(options.workers), "--batch", str(options.batch)]
    given += ["--log-format", options.log_format, *(["--memory", options.memory] if options.memory else [])]
    return [*given, "--deterministic"] if options.deterministic else given


def main(arguments: Sequence[str]) -> int:
    """Run as the arguments say; the exit code is that of the error."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--fd", type=int, default=-1, help="number of the socket to the process that started this one")
    parser.add_argument("--join", default="", help="HOST:PORT of a server's --engine-port")
    parser.add_argument("--key-file", default="", help="file with the key that the server has, too")
    parser.add_argument("--place", type=int, default=-1, help="which of the devices or groups of cores; all by default")
    for name, kind in (("device", str), ("memory", str), ("workers", int), ("batch", int), ("reload-seconds", float)):
        parser.add_argument(f"--{name}", type=kind, default=None, help="as of `deploy serve-engine`")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="as of `deploy serve-engine`")
    parser.add_argument("--deterministic", action="store_true", help="as of `deploy serve-engine`")
    parser.add_argument("bundles", nargs="*", help="FOLDER or NAME=FOLDER")
    given = parser.parse_args(arguments)
    set_up_logs(given.log_format)
    if given.fd >= 0:
        work(given.fd)
    chosen = {name: getattr(given, name) for name in ("device", "memory", "workers", "batch", "reload_seconds")
              if getattr(given, name) is not None}
    options = EngineOptions(**chosen, deterministic=given.deterministic, engine_key_file=given.key_file,
                            log_format=given.log_format)
    try:
        if given.place < 0:
            join(given.join, given.bundles, options)
        else:
            catalog = Catalog(given.bundles, device=options.device.split(",")[0], deterministic=options.deterministic)
            _Joined(*_address(given.join), read_key(given.key_file), catalog, placed(options)[given.place]).run(
                options.reload_seconds)
    except DeployError as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
