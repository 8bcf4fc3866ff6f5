"""A Ray cluster of several nodes on this machine with our server on it, and clients with a ledger of what they were
answered."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

import runtimes
from runtimes.serving.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
# What Ray's processes read when they start; those of a work tree must import its packages.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT),
               "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
STEPS = 10
PROMPT = "a red apple"


@dataclass
class Nodes:
    """The running cluster: a head that has the volume and nothing else, and nodes that run engines and fronts."""

    cluster: Any
    workers: list[Any]
    server: Any

    def processes(self, title: str) -> list[psutil.Process]:
        """Of our nodes alone, by how Ray calls them: "ServeReplica:ldm-deploy:engines", "StateService"."""
        found = []
        for node in self.cluster.list_all_nodes():
            for info in node.all_processes.get("raylet", []):
                with still_there():
                    for child in psutil.Process(info.process.pid).children(recursive=True):
                        with still_there():
                            if child.cmdline() and child.cmdline()[0].startswith(f"ray::{title}"):
                                found.append(child)
        return found

    def kill(self, title: str) -> int:
        """kill -9 of the first process of that name; its number."""
        process = self.processes(title)[0]
        os.kill(process.pid, signal.SIGKILL)
        return process.pid

    def kill_node(self) -> None:
        """kill -9 of a worker node with all that runs there, and another node in its place."""
        self.cluster.remove_node(self.workers.pop(0), allow_graceful=False)

    def add_node(self) -> None:
        """One more worker node."""
        self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000))


@contextmanager
def still_there() -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        pass


@contextmanager
def running(bundles: Sequence[str], state: Path, *, replicas: str = "2:2", fronts: int = 2, nodes: int = 2,
            **options: Any) -> Iterator[Nodes]:
    """Our server on a cluster of `nodes` and a head, all of it gone at the end."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        import ray
        from ray.cluster_utils import Cluster

        from runtimes.serving.cluster.deployments import RayServer, free_port

        cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "resources": {"ldm-state": 1}, "object_store_memory": 100_000_000,
            "include_dashboard": False})
        try:
            found = Nodes(cluster, [], None)
            for _ in range(nodes):
                found.add_node()
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, namespace="ldm-deploy")
            settings = ServerOptions(**{"deterministic": True, "port": free_port("127.0.0.1"), "state": str(state),
                                        "replicas": replicas, **options})
            found.server = RayServer(settings, bundles, fronts=fronts, engine_cpus=0.1, drain_seconds=20.0,
                                     proxies="HeadOnly")
            yield found
        finally:
            from ray import serve

            with_all(serve.shutdown, ray.shutdown, cluster.shutdown)
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def with_all(*steps: Callable[[], object]) -> None:
    """Every step, also where one before it fails; then the first failure."""
    failures = []
    for step in steps:
        try:
            step()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


@dataclass
class Ledger:
    """What clients asked for and were answered, by them alone.

    Attributes:
        jobs: id of every accepted job -> its seed.
        images: seed of every synchronous request that was answered -> its PNG.
        refused: of jobs and of synchronous requests, what they were answered instead.
        seconds: of each synchronous request, and when it ended.
    """

    address: str
    model: str = "emoji"
    steps: int = STEPS
    jobs: dict[str, int] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def body(self, seed: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": PROMPT, "seed": seed, "num_inference_steps": self.steps}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=120.0, limits=httpx.Limits(max_keepalive_connections=0))

    def ask(self, client: httpx.Client, seed: int) -> None:
        """One synchronous request."""
        began = time.monotonic()
        try:
            answer = client.post("/v1/images/generations", json={**self.body(seed), "response_format": "b64_json"})
        except httpx.HTTPError as error:
            self.refused.append(("request", type(error).__name__))
            return
        self.seconds.append((time.monotonic() - began, time.monotonic()))
        if answer.status_code == 200:
            self.images[seed] = base64.b64decode(answer.json()["data"][0]["b64_json"])
        else:
            self.refused.append(("request", f"{answer.status_code} {answer.text:.200}"))

    def submit(self, client: httpx.Client, seed: int) -> None:
        """One job. It is in the ledger from the moment at which its id is known here."""
        try:
            answer = client.post("/v1/jobs", json=self.body(seed))
        except httpx.HTTPError as error:
            self.refused.append(("job", type(error).__name__))
            return
        if answer.status_code == 202:
            self.jobs[answer.json()["id"]] = seed
        else:
            self.refused.append(("job", f"{answer.status_code} {answer.text:.200}"))

    @contextmanager
    def load(self, *, clients: int = 2, jobs_each: int = 15, pause: float = 0.3) -> Iterator[None]:
        """Clients of both kinds beside what the caller does; each ends after `jobs_each` jobs, or with the block."""
        over = threading.Event()

        def work(number: int, one: Callable[[httpx.Client, int], None], seconds: float, most: int) -> None:
            with self.client() as client:
                for count in range(most):
                    if over.is_set():
                        return
                    one(client, 1000 * number + count)
                    over.wait(seconds)

        threads = [threading.Thread(target=work, args=(number, one, seconds, most))
                   for number in range(clients) for number, one, seconds, most in (
                       (2 * number + 1, self.ask, 0.02, 400), (2 * number + 2, self.submit, pause, jobs_each))]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def ends(self, seconds: float = 180.0) -> dict[str, dict[str, Any]]:
        """Every accepted job as it ended; those that did not within the time as they are."""
        until, found = time.monotonic() + seconds, dict[str, dict[str, Any]]()
        with self.client() as client:
            while len(found) < len(self.jobs) and time.monotonic() < until:
                for identity in set(self.jobs) - set(found):
                    try:
                        answer = client.get(f"/v1/jobs/{identity}")
                    except httpx.HTTPError:
                        continue
                    if answer.status_code == 200 and answer.json()["status"] not in ("queued", "running"):
                        found[identity] = answer.json()
                time.sleep(0.3)
            for identity in set(self.jobs) - set(found):
                found[identity] = client.get(f"/v1/jobs/{identity}").json()
        return found

    def job_images(self, ends: dict[str, dict[str, Any]]) -> dict[int, bytes]:
        """The images of completed jobs by their seeds."""
        with self.client() as client:
            return {self.jobs[identity]: client.get(end["images"][0]["url"]).content
                    for identity, end in ends.items() if end["status"] == "completed"}

    def statuses(self, ends: dict[str, dict[str, Any]]) -> Counter[str]:
        return Counter(end["status"] for end in ends.values())


def rebuilt(bundle: Path, folder: Path) -> Path:
    """A copy that another build made, as its manifest says: another digest, the same images."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tools"]["rebuilt"] = "1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Alone:
    """The images as one pipeline makes them, each by itself."""

    def __init__(self, bundle: Path, steps: int = STEPS) -> None:
        self._pipeline, self._steps = runtimes.load(bundle, threads=1, deterministic=True), steps

    def image(self, seed: int) -> np.ndarray:
        return np.asarray(self._pipeline(PROMPT, seed=seed, steps=self._steps)[0])

    def wrong(self, images: dict[int, bytes]) -> list[int]:
        """Seeds whose image is another one."""
        return [seed for seed, content in images.items()
                if not np.array_equal(np.asarray(Image.open(io.BytesIO(content))), self.image(seed))]


def wait_until(condition: Callable[[], object], seconds: float = 90.0) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it does not come"
        time.sleep(0.2)
    return time.monotonic() - began
