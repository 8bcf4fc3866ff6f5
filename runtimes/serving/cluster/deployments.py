"""`run` and `RayServer`: what `deploy serve --ray` starts, on the cluster that RAY_ADDRESS names or on one of its own.

    with RayServer(options, ["emoji=build/emoji"]) as server:
        print(server.address)
        server.update(["emoji=build/newer"])        # a rolling update: no request fails

On a cluster of others the application goes on when this process ends; on one of its own both end together, after what
is under way.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Ray reports its use to its makers unless this is said before it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from runtimes.errors import InputError, UnavailableError
from runtimes.serving.cluster.application import built
from runtimes.serving.cluster.cluster_settings import (
    APPLICATION,
    NAMESPACE,
    STATE_RESOURCE,
    ClusterSettings,
    user_config,
)
from runtimes.serving.options import ServerOptions

CORES = 8  # of one engine on the CPU, as of a worker of the server of one machine
FRONT_CPUS = 0.1


def run(bundles: Sequence[str], options: ServerOptions, say: Callable[[str], None] = lambda line: None) -> None:
    """Serve on a cluster: until a signal ends it on one of its own, and then drained; on another's, deploy and return.

    Args:
        bundles: FOLDER or NAME=FOLDER each, the same on every node.
        options: how.
        say: receives lines for the user.

    Raises:
        InputError, UnavailableError: see `RayServer`.
    """
    ended = threading.Event()
    with RayServer(options, bundles) as server:
        say(f"serving at {server.address}")
        if not server.own:
            say("the application goes on in the cluster; `serve shutdown` ends it")
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()


class RayServer:
    """Starts with it; a context manager that drains at its end."""

    def __init__(self, options: ServerOptions, bundles: Sequence[str], *, fronts: int = 1,
                 engine_cpus: float | None = None, drain_seconds: float = 120.0,
                 proxies: str = "EveryNode") -> None:
        """Deploy, and wait until it serves. A server that the cluster has already is brought to this state.

        Args:
            options: of `serve`.
            bundles: NAME=FOLDER, or FOLDER; the folders are the same on every node.
            fronts: replicas that take HTTP requests.
            engine_cpus: of one engine; by default what the smallest node has, at most 8.
            drain_seconds: how long requests under way may take at the end.
            proxies: nodes that listen, as Ray Serve's `proxy_location`; "HeadOnly" where several share a host.

        Raises:
            InputError: a bundle that cannot be served, or options that a cluster does not honour.
            UnavailableError: the cluster has no node with the volume, or the application does not start.
        """
        refuse_what_is_not_honoured(options)
        config = user_config(bundles, options.digest, options.first_device)
        self.own = not os.environ.get("RAY_ADDRESS")  # whether the cluster is
        if not ray.is_initialized():
            own: dict[str, Any] = {"resources": {STATE_RESOURCE: 1}, "include_dashboard": False} if self.own else {}
            ray.init(address=os.environ.get("RAY_ADDRESS") or "local", namespace=NAMESPACE, log_to_driver=False, **own)
        else:
            self.own = False
        gpu = not options.device.startswith("cpu")
        self.settings = ClusterSettings(
            options, fronts=fronts, engine_gpus=float(gpu), front_cpus=FRONT_CPUS, drain_seconds=drain_seconds,
            engine_cpus=engine_cpus if engine_cpus is not None else 1.0 if gpu else engine_share())
        self.port = options.port or free_port(options.host)
        try:
            serve.start(proxy_location=proxies, http_options={"host": options.host, "port": self.port})
            self._deploy(config)
        except BaseException:
            self.close(drain=False)
            raise

    @property
    def address(self) -> str:
        """Of this node's proxy; the others listen on the same port."""
        return f"http://{self.settings.server.host}:{self.port}"

    def __enter__(self) -> RayServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, bundles: Sequence[str], digests: Sequence[str] = ()) -> None:
        """Serve these bundles from now on. Replicas load them beside the old ones; what runs finishes on those.

        Raises:
            InputError: a bundle that cannot be served; nothing changes then.
            UnavailableError: a replica could not load one.
        """
        self._deploy(user_config(bundles, digests, self.settings.device))

    def close(self, *, drain: bool = True) -> None:
        """End what was started here: the application and the cluster, if it is our own."""
        if not ray.is_initialized():
            return
        if self.own:
            if drain:
                serve.delete(APPLICATION)
            serve.shutdown()
            ray.shutdown()

    def _deploy(self, config: Mapping[str, Any]) -> None:
        try:
            serve.run(built(self.settings, config), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            status = serve.status().applications.get(APPLICATION)
            if status is None or status.status == ApplicationStatus.RUNNING:
                raise
            reasons = [deployment.message for deployment in status.deployments.values() if deployment.message]
            raise UnavailableError(" ".join([status.message, *reasons]).strip() or str(error), where="ray",
                                   fix="see Ray's logs") from error


def refuse_what_is_not_honoured(options: ServerOptions) -> None:
    """Options that mean nothing on a cluster.

    Raises:
        InputError: names the first.
    """
    for name, reason in (("engine_port", "Ray's replicas are the engines"),
                         ("engine_key_file", "Ray's replicas are the engines"),
                         ("workers", "Ray starts as many as --replicas says"),
                         ("root_path", "Ray Serve's proxies have none"),
                         ("reload_seconds", "run the command again to exchange a bundle")):
        if getattr(options, name) != getattr(ServerOptions, name):
            raise InputError(f"it has no effect with --ray: {reason}", where=f"--{name.replace('_', '-')}",
                             fix="leave it out")
    if options.device == "none":
        raise InputError("Ray's replicas are the engines", where="--device", fix="leave it out, or give cuda")
    if not options.state:
        raise InputError("several machines need one folder of jobs and images", where="--state",
                         fix=f"a folder on the node that has the resource {STATE_RESOURCE}")


def engine_share() -> float:
    """CPUs that one engine takes: what the smallest node has beside a front, at most 8."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return float(min(CORES, max(min((cpus for cpus in nodes if cpus > 0), default=1.0) - 2 * FRONT_CPUS, 0.1)))


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])
