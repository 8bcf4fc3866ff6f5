"""`run`: a whole server in this process and its workers: bundles, state, HTTP. It ends on SIGTERM or SIGINT, drained.

    run(["emoji=build/emoji"], ServerOptions(port=8000), say=print)

Ending is in order: no new request is taken, streams of jobs end, synchronous requests are answered, jobs that run are
finished or queued again for the next start, workers end, the state is closed. A second signal cuts this short.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.errors import UnavailableError
from runtimes.serving.engine.catalog import Catalog
from runtimes.serving.logs import set_up_logs
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.dispatcher import Dispatcher, Writing
from runtimes.serving.state.job_store import JobStore
from runtimes.serving.state.result_cache import ResultCache
from runtimes.serving.state.retention import Retention
from runtimes.serving.workers.pool import WorkerPool
from runtimes.system.byte_sizes import parse_bytes
from runtimes.system.cache_root import cache_home

if TYPE_CHECKING:
    from runtimes.serving.http.service import Service

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
MOST_JOINED = 8  # engines of other machines that are kept busy with jobs
DRAIN_SECONDS = 30.0  # for what runs at the end; Kubernetes' templates allow more before they kill


def run(bundles: Sequence[str], options: ServerOptions, say: Callable[[str], None] = lambda line: None) -> None:
    """Serve until a signal ends it.

    Args:
        bundles: FOLDER or NAME=FOLDER each.
        options: how.
        say: receives the line with the address, once requests are taken.

    Raises:
        InputError: a bundle, key file or option that cannot be used; nothing was started.
        UnavailableError: the port, the device or the state folder is taken.
    """
    from runtimes.serving.http.app import create_app
    from runtimes.serving.http.connections import HttpServer

    set_up_logs(options.log_format)
    catalog = Catalog(bundles, options.digest, device=options.first_device,
                      deterministic=options.deterministic)
    with _listening(options) as listener, _service(catalog, options) as (service, pool):
        server = HttpServer(create_app(service), on_end=service.drain)
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"
        threading.Thread(target=_open, args=(service, pool, lambda: say(f"serving {', '.join(catalog)} at {address}")),
                         name="opening", daemon=True).start()
        server.run(sockets=[listener])
        logger.info("no request is taken any more; what runs is finished")


def state_folder(options: ServerOptions) -> Path:
    """Where jobs and images are: `--state`, or a folder of its own for each port."""
    return Path(options.state).expanduser() if options.state else cache_home() / "serve" / f"port-{options.port}"


def _open(service: Service, pool: WorkerPool, ready: Callable[[], None]) -> None:
    """Take requests once the first worker is there."""
    while service.state == "starting":
        if pool.wait_until_ready(LOOK_SECONDS) and service.state == "starting":
            service.state = "serving"
            ready()


@contextmanager
def _listening(options: ServerOptions) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=512)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}",
                               where="--port", fix="stop what listens there, or give another --port") from error
    with listener:
        yield listener


@contextmanager
def _service(catalog: Catalog, options: ServerOptions) -> Iterator[tuple[Service, WorkerPool]]:
    """All parts, started in the order in which they need each other, and ended in the other."""
    from runtimes.serving.http.keys import KeyRing, Signer
    from runtimes.serving.http.observed import Metrics
    from runtimes.serving.http.service import Service

    keys = KeyRing.read(options.api_key_file) if options.api_key_file else KeyRing()
    keep = parse_bytes(options.keep_bytes, "--keep-bytes", 0)
    cached = parse_bytes(options.cache_bytes, "--cache-bytes", 0)
    folder = state_folder(options)
    metrics = Metrics()
    with JobStore(folder) as store, WorkerPool.of(catalog, options, metrics.observe) as pool:
        cache = ResultCache(cached) if cached else None
        service = Service(catalog, pool, store, options, Signer.of(folder, hours=options.keep_hours), keys, metrics,
                          cache, state="starting")
        retention = Retention(store, hours=options.keep_hours, image_bytes=keep)
        workers = len(pool.status().workers) + (MOST_JOINED if options.engine_port else 0)
        writing = Writing(options.safety, options.metadata, most_jobs=2 * options.batch * max(workers, 1))
        dispatcher = Dispatcher(store, pool, catalog, writing=writing, cache=cache, watch=metrics.observe,
                                on_full=retention.look)
        try:
            yield service, pool
        finally:
            service.drain()
            dispatcher.stop(DRAIN_SECONDS)
            retention.stop()
