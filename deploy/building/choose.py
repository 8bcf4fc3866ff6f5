"""`build` with all decided that the spec leaves open: the share of channels to prune, the target. Then one build."""

from __future__ import annotations

from pathlib import Path

from deploy.building import choose_share, choose_target
from deploy.building.builder import Outcome, build_decided
from deploy.core.plan import PlannedPass, load_passes, plan_all
from deploy.core.progress import Listener, Silent, listening
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import open_origin
from deploy.passes import PASSES
from runtimes.bundle.manifest import to_json


def run_build(spec: BuildSpec, output: Path | None = None, *, progress: Listener | None = None,
              cache_root: Path | None = None) -> Outcome:
    """Build a bundle.

    Args:
        spec: what to build.
        output: folder of the bundle; default `build/<model>-<target>-<precision>`.
        progress: receives what happens.
        cache_root: where finished components are cached; default `~/.cache/ldm-deploy`.

    Raises:
        InputError: bad model, spec or output (nothing is written).
        ParityError: a pass broke the accuracy budget; the message names pass, component and shape.
        UnavailableError: this machine lacks something.
    """
    listener = progress or Silent()
    with listening(listener):
        spec, tried = choose_share.decide(spec, cache_root, listener)
        spec = choose_target.decide(spec, cache_root, listener)
    found = {"prune_candidates": to_json(tried)} if tried else {}
    return build_decided(spec, output, progress=listener, cache_root=cache_root, found=found)


def plan_build(spec: BuildSpec) -> list[PlannedPass]:
    """Lay out a build without any work.

    Raises:
        InputError: the model cannot be read, something is left to decide, or the passes do not fit together.
    """
    choose_target.require_decided(spec)
    return plan_all(load_passes(PASSES), open_origin(spec).manifest, spec)
