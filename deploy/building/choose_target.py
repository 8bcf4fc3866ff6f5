"""Chooses for `--target auto` the runtime of this machine's CPU on which the denoiser of this build is faster."""

from __future__ import annotations

import statistics
from importlib import util
from typing import TYPE_CHECKING

from deploy.building.builder import build_decided, workspace
from deploy.core.call_times import seconds_in_turns, usual_feeds
from deploy.core.doctor import machine
from deploy.core.pass_cache import Cache, versions_of
from deploy.model.source_bundle import open_origin
from runtimes.backends.session import Session, SessionOptions
from runtimes.errors import InputError
from runtimes.pipeline.bundle_sessions import open_session
from runtimes.system.cache_root import cache_home
from runtimes.system.progress import Silent, listener, listening

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

AUTO = "auto"
CANDIDATES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}  # target -> module that must be installed
CALLS, WARM_UP = 15, 3


def decide(spec: BuildSpec) -> BuildSpec:
    """The spec with its target decided; any other target than "auto" is left alone.

    What was measured is kept in the cache by model, spec, processor and versions: the same build decides alike.

    Raises:
        DeployError: as `build_decided`, of which it makes one for each candidate, without verification.
    """
    if spec.target != AUTO:
        return spec
    cache = Cache(cache_home())
    there = [target for target, module in CANDIDATES.items() if util.find_spec(module) is not None]
    host = machine()
    key = {"kind": "auto target", "source": open_origin(spec).manifest.digest, "spec": spec.resolved(),
           "processor": [host["processor"], host.get("instructions"), host["cores"]],
           "libraries": versions_of(tuple(there))}
    seconds = cache.find_fact(key)
    if seconds is None:
        seconds = _measured(spec, there)
        cache.store_fact(key, seconds)
    best = min(seconds, key=lambda target: float(seconds[target]))
    others = ", ".join(f"{t} takes {seconds[t] / seconds[best]:.2f} times as long" for t in seconds if t != best)
    listener().finished(f"target auto: {best} ({others or 'the only runtime installed'})")
    return spec.model_copy(update={"target": best})


def require_decided(spec: BuildSpec) -> None:
    """For a dry run, which measures nothing.

    Raises:
        InputError: the target is still to be decided, or the share of channels to prune.
    """
    if spec.prune_candidates:
        raise InputError("several shares are decided by building each, which a dry run does not", where="--prune",
                         fix="name one of them")
    if spec.target == AUTO:
        raise InputError("auto is decided by measuring, which a dry run does not", where="--target",
                         fix=f"name one of {', '.join(CANDIDATES)}")


def _measured(spec: BuildSpec, targets: list[str]) -> dict[str, float]:
    """Median seconds of one call of the denoiser by target, the targets taking turns."""
    with workspace(cache_home()) as folder:
        sessions: dict[str, Session] = {}
        for target in targets:
            listener().working(f"target auto: building for {target}")
            with listening(Silent()):
                made = build_decided(spec.model_copy(update={"target": target, "verify": "no"}), folder / target)
            denoiser = made.bundle.manifest.pipeline.denoiser.component
            sessions[target] = open_session(made.bundle, denoiser, SessionOptions())
        listener().working("target auto: measuring")
        found = seconds_in_turns(sessions, usual_feeds(made.bundle.component(denoiser)), CALLS, WARM_UP)
        return {target: statistics.median(seconds) for target, seconds in found.items()}
