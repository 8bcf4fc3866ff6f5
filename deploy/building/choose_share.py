"""Chooses among `--prune 0.5,0.3,0.15`: the largest share of channels whose build stays within the accuracy budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deploy.building.builder import build_decided, workspace
from deploy.core.call_times import seconds_in_turns, usual_feeds
from deploy.core.pass_cache import Cache, versions_of
from deploy.core.whole_denoiser import open_whole
from deploy.model.source_bundle import open_origin
from runtimes.backends.session import Session, SessionOptions
from runtimes.bundle.folder import Bundle
from runtimes.bundle.manifest import Component
from runtimes.errors import ParityError, UnavailableError
from runtimes.system.cache_root import cache_home
from runtimes.system.progress import Silent, listener, listening

if TYPE_CHECKING:
    from deploy.core.spec import BuildSpec

TIMED_CALLS = 9


@dataclass(frozen=True)
class Candidate:
    """One share of channels, as its whole build came out.

    Attributes:
        prune: the share; 0 is the U-Net as it was.
        bytes, macs: of the U-Net.
        seconds: of one of its calls, median; None where it cannot run here.
        trajectory_relative_l2, psnr_db, ssim: of the worst image, retrieval: share found again; each None where it
            was not compared.
        broken: what is outside the budget, empty if nothing is.
    """

    prune: float
    bytes: int
    macs: int
    seconds: float | None
    trajectory_relative_l2: float | None
    psnr_db: float | None
    ssim: float | None
    retrieval: float | None
    broken: str

    def __str__(self) -> str:
        figures = [f"{self.bytes / 1e6:.1f} MB", f"{self.macs / 1e6:.0f} MMACs"]
        figures += [] if self.psnr_db is None else [f"PSNR {self.psnr_db:.1f} dB"]
        figures += [] if self.retrieval is None else [f"retrieval {self.retrieval:.1%}"]
        return f"{self.prune:.0%}: {', '.join(figures)}"


def decide(spec: BuildSpec) -> tuple[BuildSpec, list[Candidate]]:
    """The spec with one share of channels; one without candidates is left alone.

    From the largest down each is built and compared like any build, with the recovery that the spec asks for; the first
    that keeps the budget is it, and last comes the U-Net as it was. What came out is kept in the cache.

    Returns:
        the spec, and what was tried, largest share first.

    Raises:
        ParityError: not even the U-Net as it was keeps the budget; names the best found.
        DeployError: as `build_decided`.
    """
    if not spec.prune_candidates:
        return spec, []
    cache = Cache(cache_home())
    key = {"kind": "prune candidates", "source": open_origin(spec).manifest.digest, "spec": spec.resolved(),
           "libraries": versions_of(("onnxruntime", "openvino", "torch", "torch-pruning", "diffusers"))}
    known = cache.find_fact(key)
    if known is None:
        tried = _tried(spec)
        cache.store_fact(key, {"tried": [asdict(candidate) for candidate in tried]})
    else:
        tried = [Candidate(**entry) for entry in known["tried"]]
    if tried[-1].broken:
        best = max(tried, key=lambda c: (c.retrieval or 0, c.psnr_db or 0))
        raise ParityError(f"no share of channels keeps the budget; the best found is {best}; of it {best.broken}",
                          where="--prune", fix="loosen the budget, or recover for more steps")
    listener().finished(f"prune: {tried[-1]} is the most that keeps the budget")
    return spec_of(spec, tried[-1].prune), tried


def spec_of(spec: BuildSpec, share: float) -> BuildSpec:
    """One candidate's; without pruning there is nothing that recovers."""
    chosen = spec.model_copy(update={"prune": share, "prune_candidates": ()})
    return chosen if chosen.prunes else chosen.model_copy(update={"recover": 0, "recover_prompts": ()})


def _tried(spec: BuildSpec) -> list[Candidate]:
    built: dict[float, Bundle] = {}
    broken: dict[float, str] = {}
    figures: dict[float, Mapping[str, Any] | None] = {}
    with workspace(cache_home()) as folder:
        for share in (*sorted(spec.prune_candidates, reverse=True), 0.0):
            candidate, place = spec_of(spec, share), folder / f"prune-{share}"
            listener().working(f"prune: trying {share:.0%}")
            try:
                built[share] = build_decided(candidate, place).bundle
                broken[share], figures[share] = "", built[share].manifest.parity
            except ParityError as error:
                broken[share], figures[share] = error.what, error.figures
                # All of it comes from the cache: this asks how large and fast what was refused is.
                unproven = candidate.model_copy(update={"verify": "no"})
                with listening(Silent()):
                    built[share] = build_decided(unproven, place).bundle
                listener().finished(f"prune: {share:.0%} does not keep the budget: {error.what}")
            if not broken[share]:
                break
        seconds = _seconds(built)
    return [_candidate(share, built[share], seconds.get(share), figures[share], broken[share]) for share in built]


def _seconds(built: Mapping[float, Bundle]) -> dict[float, float]:
    """Median seconds of one call of each denoiser, in turns; nothing of engines, whose GPU is elsewhere."""
    sessions: dict[str, Session] = {}
    try:
        for share, bundle in built.items():
            # Whole: what runs before the steps gives each of them other inputs.
            sessions[str(share)] = open_whole(bundle, bundle.manifest.pipeline.denoiser.component, SessionOptions())
    except UnavailableError:
        return {}
    feeds = usual_feeds(next(iter(sessions.values())).component)
    return {float(name): statistics.median(found)
            for name, found in seconds_in_turns(sessions, feeds, TIMED_CALLS).items()}


def _denoiser(bundle: Bundle) -> Component:
    return bundle.component(bundle.manifest.pipeline.denoiser.component)


def _candidate(share: float, bundle: Bundle, seconds: float | None, figures: Mapping[str, Any] | None,
               broken: str) -> Candidate:
    network, images, found = _denoiser(bundle), (figures or {}).get("images") or {}, figures or {}
    drift: Sequence[float | None] = (found.get("trajectory") or {}).get("relative_l2") or [None]
    return Candidate(share, network.bytes, network.graph.macs or 0, seconds, drift[-1], images.get("psnr_db"),
                     images.get("ssim"), (found.get("retrieval") or {}).get("bundle"), broken)
