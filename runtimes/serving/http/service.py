"""`Service`: everything that the HTTP interface works with, put together by `runtimes.serving.server`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtimes.errors import UnavailableError
from runtimes.serving.engine.catalog import ServedModel
from runtimes.serving.engine.contract import Pool
from runtimes.serving.http.failures import HttpError
from runtimes.serving.http.keys import KeyRing, RateLimiter, Signer
from runtimes.serving.http.observed import Metrics
from runtimes.serving.options import ServerOptions
from runtimes.serving.state.result_cache import ResultCache
from runtimes.serving.state.store import Store
from runtimes.system.byte_sizes import parse_bytes


@dataclass
class Service:
    """The parts of a running server.

    Attributes:
        catalog: names to served bundles; the first is used where a request names none.
        pool: runs requests.
        store: jobs and images.
        options: of the server.
        signer: of image addresses.
        keys: who may use the server.
        metrics: figures for Prometheus.
        cache: finished images by request and bundle; None caches nothing.
        state: "starting", "serving" or "draining": what /health/ready says, and whether requests are taken.
        chosen: model that an owner chose through A1111's options.
        runs: what is under way of each owner through A1111's endpoints, the oldest first.
    """

    catalog: Mapping[str, ServedModel]
    pool: Pool
    store: Store
    options: ServerOptions
    signer: Signer
    keys: KeyRing = field(default_factory=KeyRing)
    metrics: Metrics = field(default_factory=Metrics)
    cache: ResultCache | None = None
    state: str = "serving"
    chosen: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read sizes, and let the metrics ask the parts."""
        self.max_body = parse_bytes(self.options.max_body, "--max-body")
        self.rates = RateLimiter(self.options.rate_limit)
        self.metrics.watch(self.pool.status, self.store.counts)

    def model(self, name: str | None, owner: str = "") -> ServedModel:
        """A served bundle.

        Args:
            name: that the request gave; None is the one that the owner chose, or the first.
            owner: whose request it is.

        Raises:
            HttpError: 404: there is none of this name.
        """
        name = name or self.chosen.get(owner) or next(iter(self.catalog))
        found = self.catalog.get(name)
        if found is None:
            raise HttpError(404, f"no model {name!r:.120}", code="model_not_found", where="model",
                            fix=f"one of {', '.join(self.catalog)}")
        return found

    def drain(self) -> None:
        """Take nothing more: /health/ready says so, and streams of jobs end."""
        self.state = "draining"

    def check_open(self, *, journaled: bool = False) -> None:
        """Refuse work while it could not be done.

        Args:
            journaled: whether it is a job, which waits on disk where the workers are not there yet.

        Raises:
            UnavailableError: the server is starting or shutting down.
        """
        if self.state != "serving" and not (journaled and self.state == "starting"):
            raise UnavailableError(f"the server is {self.state}", where="server", fix="ask again")
