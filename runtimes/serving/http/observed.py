"""What a server says of itself: figures for Prometheus, one line of the log a request, spans for OpenTelemetry.

Prompts, keys and the queries of addresses are never logged. Every line that is logged during a request has its id.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi.telemetry import TelemetryConfig
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtimes.errors import UnavailableError
from runtimes.inputs.request import Request
from runtimes.serving.engine.contract import PoolStatus, WorkerStatus

ACCESS = logging.getLogger("runtimes.serving.access")
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

WORKER_FIGURES: Mapping[str, tuple[str, Callable[[WorkerStatus], float]]] = {
    "alive": ("Whether a worker takes requests.", lambda worker: float(worker.alive)),
    "running": ("Images that a worker denoises.", lambda worker: float(worker.running)),
    "memory_bytes": ("Memory of a worker's process.", lambda worker: float(worker.memory_bytes)),
    "restarts": ("How often a worker was started again.", lambda worker: float(worker.restarts)),
    "models": ("Bundles that a worker has loaded.", lambda worker: float(len(worker.models))),
}


class Metrics:
    """Counters and histograms of one server, in a registry of its own. Safe to share between threads."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter("ldm_http_requests", "Requests by route, method and status.",
                                ("route", "method", "status"), registry=registry)
        self.seconds = Histogram("ldm_http_seconds", "From a request's head to the end of its answer.", ("route",),
                                 buckets=SECONDS, registry=registry)
        histograms = {
            "wait": ("ldm_wait_seconds", "What a request or job waited in the queue.", SECONDS),
            "service": ("ldm_service_seconds", "From a request's or job's first step to its images.", SECONDS),
            "batch": ("ldm_batch_images", "Images that shared a denoiser call.", BATCHES),
            "job wait": ("ldm_job_wait_seconds", "What a claimed job waited before its first step.", SECONDS),
            "job service": ("ldm_job_service_seconds", "From a job's first step to its images.", SECONDS),
            "write": ("ldm_job_write_seconds", "Writing a job's images to disk.", SECONDS)}
        self._histograms = {figure: Histogram(name, text, buckets=buckets, registry=registry)
                            for figure, (name, text, buckets) in histograms.items()}
        self.images = Counter("ldm_images", "Images that were generated.", ("of",), registry=registry)
        self.steps = Counter("ldm_steps", "Denoising steps of all images; its rate is steps a second.", ("of",),
                             registry=registry)
        self.failures = Counter("ldm_failures", "Requests without images, by reason.", ("reason",), registry=registry)
        self.cache = Counter("ldm_result_cache", "Look-ups in the cache of finished images.", ("result",),
                             registry=registry)

    def observe(self, figure: str, value: float) -> None:
        """What pools and the dispatcher report, given to them as `watch`.

        Args:
            figure: "wait", "service", "job wait", "job service" and "write" in seconds; "batch" images;
                "job images" and "job steps" of a job that has ended. Others are not shown.
            value: of it.
        """
        if (histogram := self._histograms.get(figure)) is not None:
            histogram.observe(value)
        elif figure in ("job images", "job steps"):
            (self.images if figure == "job images" else self.steps).labels("jobs").inc(value)

    def served(self, request: Request) -> None:
        """A synchronous request has its images."""
        self.images.labels("requests").inc(request.count)
        self.steps.labels("requests").inc(request.count * request.steps)

    def failed(self, reason: str) -> None:
        """A request got no images."""
        self.failures.labels(reason).inc()

    def watch(self, pool: Callable[[], PoolStatus], jobs: Callable[[], Mapping[str, int]]) -> None:
        """Ask the pool and the store whenever the figures are read."""
        self.registry.register(_Live(pool, jobs))

    def text(self) -> bytes:
        """As Prometheus reads it. It asks pool and store, which may block."""
        return generate_latest(self.registry)


class _Live(Collector):
    """Figures that are asked for when they are read."""

    def __init__(self, pool: Callable[[], PoolStatus], jobs: Callable[[], Mapping[str, int]]) -> None:
        self._pool, self._jobs = pool, jobs

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for while a registry is put together."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The figures as they are now."""
        status = self._pool()
        yield GaugeMetricFamily("ldm_queue_depth", "Requests that wait for a worker.", status.waiting)
        yield GaugeMetricFamily("ldm_running", "Requests that are being denoised.", status.running)
        yield GaugeMetricFamily("ldm_images_per_second", "Rate measured lately.", status.images_per_second)
        for name, (text, figure) in WORKER_FIGURES.items():
            family = GaugeMetricFamily(f"ldm_worker_{name}", text, labels=("worker",))
            for worker in status.workers:
                family.add_metric((worker.name,), figure(worker))
            yield family
        figures = GaugeMetricFamily("ldm_engine", "Further figures of the engines.", labels=("figure",))
        for name, value in status.figures.items():
            figures.add_metric((name,), value)
        yield figures
        jobs = GaugeMetricFamily("ldm_jobs", "Jobs of the store.", labels=("status",))
        for state, count in self._jobs().items():
            jobs.add_metric((state,), count)
        yield jobs


# ---- the log --------------------------------------------------------------------------------------------------------


def request_id(given: str | None) -> str:
    """The id that a proxy or client gave, if it is sane, or a new one."""
    return given if given and SANE_ID.fullmatch(given) else uuid.uuid4().hex


def log_access(method: str, path: str, status: int, seconds: float, **fields: Any) -> None:
    """One request has its answer.

    Args:
        method: of HTTP.
        path: without its query, which may hold a signature.
        status: of HTTP; 499 where the client went away.
        seconds: it took.
        fields: further ones: model, images, owner, reason.
    """
    if ACCESS.isEnabledFor(logging.INFO):
        ACCESS.info("%s %s", method, path, extra={"fields": {"status": status, "ms": round(1000 * seconds, 2),
                                                             **fields}})


# ---- spans -------------------------------------------------------------------------------------------------------


def telemetry(address: str, service_name: str) -> TelemetryConfig:
    """What FastAPI takes: spans of requests, sent by OTLP where an address is given; never their bodies.

    Raises:
        UnavailableError: an address is given, and the exporter is not installed.
    """
    settings = TelemetryConfig(tracing=bool(address), metrics=False, logs=False, operation_spans=bool(address),
                               auto_configure=False)
    if not address:
        return settings
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnavailableError("the exporter of OpenTelemetry is not installed", where="--telemetry",
                               fix="pip install 'ldm-deploy[telemetry]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    settings["tracer_provider"] = provider
    return settings
