"""What Prometheus reads: figures of requests, of the queue and the workers, of jobs and of caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtimes.serving.engine.contract import Generated, PoolStatus
from runtimes.serving.engine.ticket import Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Counters and histograms of one server, in a registry of its own. Safe to share between threads."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter("ldm_http_requests", "Requests by route, method and status.",
                                ("route", "method", "status"), registry=registry)
        self.seconds = Histogram("ldm_http_seconds", "From a request's head to the end of its answer.", ("route",),
                                 buckets=SECONDS, registry=registry)
        self.wait = Histogram("ldm_wait_seconds", "What a request waited before its first step.", buckets=SECONDS,
                              registry=registry)
        self.service = Histogram("ldm_service_seconds", "From a request's first step to its images.", buckets=SECONDS,
                                 registry=registry)
        self.batch = Histogram("ldm_batch_images", "Images that shared a denoiser call, mean over a request's steps.",
                               buckets=BATCHES, registry=registry)
        self.images = Counter("ldm_images", "Images that were generated.", ("model",), registry=registry)
        self.steps = Counter("ldm_steps", "Denoising steps of all images; its rate is steps a second.", ("model",),
                             registry=registry)
        self.failures = Counter("ldm_failures", "Requests without images, by reason.", ("reason",), registry=registry)
        self.cache = Counter("ldm_result_cache", "Look-ups in the cache of finished images.", ("result",),
                             registry=registry)

    def served(self, ticket: Ticket, generated: Generated) -> None:
        """A ticket has its images."""
        began = ticket.started if ticket.started is not None else ticket.created
        self.wait.observe(max(began - ticket.created, 0))
        self.service.observe(generated.seconds)
        self.batch.observe(generated.batch)
        self.images.labels(ticket.model).inc(ticket.images)
        self.steps.labels(ticket.model).inc(ticket.images * ticket.request.steps)

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
        workers = (("ldm_worker_alive", "Whether a worker takes requests.", lambda w: float(w.alive)),
                   ("ldm_worker_running", "Images that a worker denoises.", lambda w: float(w.running)),
                   ("ldm_worker_memory_bytes", "Memory of a worker's process.", lambda w: float(w.memory_bytes)),
                   ("ldm_worker_restarts", "How often a worker was started again.", lambda w: float(w.restarts)),
                   ("ldm_worker_models", "Bundles that a worker has loaded.", lambda w: float(len(w.models))))
        for name, text, figure in workers:
            family = GaugeMetricFamily(name, text, labels=("worker",))
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
