"""Runs `build`: decides what the spec leaves open, the share of channels to prune and the target, and builds."""

from __future__ import annotations

from pathlib import Path

from deploy.building import choose_share, choose_target
from deploy.building.builder import Outcome, build_decided
from deploy.core.plan import PlannedPass, load_passes, plan_all
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.passes import PASSES
from runtimes.bundle.manifest import to_json
from runtimes.system.cache_root import cache_home, rooted


def run_build(spec: BuildSpec, output: Path | None = None, *, cache_root: Path | None = None) -> Outcome:
    """Build a bundle, and report what happens to `runtimes.system.progress.listener()`.

    Args:
        spec: what to build.
        output: folder of the bundle; default `build/<model>-<target>-<precision>`.
        cache_root: where finished components are cached; default `runtimes.system.cache_root.cache_home()`.

    Raises:
        InputError: bad model, spec or output (nothing is written).
        ParityError: a pass broke the accuracy budget; the message names pass, component and shape.
        UnavailableError: this machine lacks something.
    """
    with rooted(cache_root or cache_home()):
        spec, tried = choose_share.decide(spec)
        spec = choose_target.decide(spec)
        return build_decided(spec, output, found={"prune_candidates": to_json(tried)} if tried else {})


def plan_build(spec: BuildSpec) -> list[PlannedPass]:
    """Lay out a build without any work.

    Raises:
        InputError: the model cannot be read, something is left to decide, or the passes do not fit together.
    """
    choose_target.require_decided(spec)
    return plan_all(load_passes(PASSES), open_origin(spec).manifest, spec)
