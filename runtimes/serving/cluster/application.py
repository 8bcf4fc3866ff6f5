"""The server as a Ray Serve application: for `deploy serve --ray`, and for a configuration file as KubeRay takes it.

    applications:
      - import_path: runtimes.serving.cluster.application:application
        args: {server: {state: /state, replicas: "1:4"}, engine_cpus: 4}
        deployments:
          - {name: engines, user_config: {bundles: {emoji: {folder: /bundles/emoji, digest: 2f32...}}}}
          - {name: front, user_config: ...}     # the same

Bundles are in `user_config`, since Ray Serve changes that on running replicas: a new bundle is loaded beside the old
one. Anything else starts replicas anew, one after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ray import serve

from runtimes.serving.cluster.cluster_settings import ClusterSettings
from runtimes.serving.cluster.engine_replica import EngineReplica
from runtimes.serving.cluster.front import ENGINES, FRONT, Front

HEALTH_SECONDS, HEALTH_TIMEOUT_SECONDS = 5.0, 30.0
MOST_CONNECTIONS = 1024  # of one front; followers of events stay connected


def application(args: dict[str, Any]) -> serve.Application:
    """What Ray Serve calls with the `args` of a configuration file.

    Raises:
        InputError: an unknown key, or a value that cannot be used.
    """
    return built(ClusterSettings.from_json(args))


def built(settings: ClusterSettings, user_config: Mapping[str, Any] | None = None) -> serve.Application:
    """Engines that are scaled by the requests that they have, and fronts before them.

    Args:
        settings: of every part.
        user_config: the bundles, as `cluster_settings.user_config` makes it; a configuration file has it itself.
    """
    common: dict[str, Any] = {
        "user_config": user_config, "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS, "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.drain_seconds}
    engines: Any = serve.deployment(
        EngineReplica, name=ENGINES, max_ongoing_requests=settings.engine_room,
        ray_actor_options={"num_cpus": settings.engine_cpus, "num_gpus": settings.engine_gpus},
        autoscaling_config={"min_replicas": settings.least, "max_replicas": settings.most,
                            "initial_replicas": settings.least, "target_ongoing_requests": settings.server.batch,
                            "upscale_delay_s": 5.0, "downscale_delay_s": settings.downscale_seconds}, **common)
    front: Any = serve.deployment(
        serve.ingress()(Front), name=FRONT, num_replicas=settings.fronts, max_ongoing_requests=MOST_CONNECTIONS,
        ray_actor_options={"num_cpus": settings.front_cpus}, **common)
    # By default every `serve.run` is a new version, and restarts all. Ours changes where something does that a running
    # replica cannot take over. (A configuration file's version is made by Ray from what it says, in the same sense.)
    version = hashlib.sha256(json.dumps([settings.to_json(), metadata.version("ldm-deploy")]).encode()).hexdigest()[:16]
    engines, front = (one.options(version=version, _internal=True) for one in (engines, front))
    bound: serve.Application = front.bind(engines.bind(settings.to_json()), settings.to_json())
    return bound
