"""Runs `verify`: proves a finished bundle again, on any machine that has the source model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deploy.building.against_diffusers import AgainstDiffusers, upstream_of
from deploy.building.builder import load_source, workspace
from deploy.core.budgets import PRUNED, budget_for
from deploy.core.pass_cache import Cache
from deploy.core.spec import LOCAL_FILES, REFERENCE, BuildSpec
from deploy.model.hub import is_name
from deploy.model.source_bundle import open_origin
from deploy.model.source_folder import model_folder
from deploy.parity.comparison_effort import LEVELS, choose
from deploy.parity.comparison_options import gallery_for, options_for
from deploy.parity.reference.answers import Reference
from deploy.parity.upstream.levels import Levels, merged
from deploy.parity.verdict import Verification, verify
from runtimes.bundle.folder import Bundle
from runtimes.codec.safety_checker import SAFETY_CHECKER
from runtimes.errors import InputError
from runtimes.system.cache_root import cache_home, rooted
from runtimes.system.device import CPU, Device

__all__ = ["Verification", "verify_bundle"]


def verify_bundle(path: Path, against: str | None = None, *, device: Device = CPU, effort: str = "auto",
                  cache_root: Path | None = None) -> Verification:
    """Compare a bundle with its source at component, trajectory and image level.

    Args:
        path: the bundle.
        against: the source model; by default the one the bundle says it was built from.
        device: where the bundle runs.
        effort: how much is compared, of `deploy.parity.comparison_effort.LEVELS` all but "no".
        cache_root: keeps the reference's answers; default `runtimes.system.cache_root.cache_home()`.

    Raises:
        BundleError: the bundle is broken.
        InputError: the source model is not there, or not the one the bundle was built from; an unknown effort.
    """
    if effort not in LEVELS or effort == "no":
        raise InputError(f"unknown effort {effort!r}", where="--effort", fix="auto, full, quick or components")
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    adapters = manifest.measured.get("adapters", {})
    model = against or source_of(bundle)
    spec = BuildSpec(model=model, variant=manifest.spec.get("variant", ""),
                     revision=manifest.source.revision if is_name(model) and not against else "",
                     target=manifest.target, precision=manifest.precision,  # type: ignore[arg-type]
                     **{name: adapters[name] for name in LOCAL_FILES if name in adapters},
                     # What the bundle holds beyond the model's usual networks; the source must answer for it, too.
                     step_cache=manifest.pipeline.denoiser.shallow is not None,
                     safety_checker=SAFETY_CHECKER in manifest.components)
    origin = open_origin(spec)
    if against is None and origin.manifest.source.sha256 != manifest.source.sha256:
        raise InputError("the model has changed since the bundle was built", where=str(origin.path),
                         fix="give the model it was built from, or any other on purpose, with --against")
    cache = Cache(cache_root or cache_home())
    with rooted(cache.root), workspace(cache.root) as work:
        source = load_source(origin, spec, cache, work)
        reference = Reference(source, cache=cache.root)
        prompts = tuple(manifest.spec.get("prompts", ()))
        pruned = not {"prune", "prune-vae"}.isdisjoint(record.name for record in manifest.passes)
        allowed = PRUNED if pruned else manifest.precision
        chosen = choose(effort, options_for(manifest.source.id, prompts, device), source.manifest.components,
                        source.manifest.pipeline)
        budget = budget_for(allowed, manifest.spec.get("budget"))
        found = verify(reference, bundle, budget, chosen, gallery_for(manifest.source.id))
        return replace(found, upstream=_against_diffusers(spec, source, bundle, found, cache))


def _against_diffusers(spec: BuildSpec, source: Bundle, bundle: Bundle, found: Verification, cache: Cache) -> Levels:
    """Weights, feeds and images against diffusers' own pipeline; images only where the bundle runs here."""
    diffusers = AgainstDiffusers(upstream_of(spec), source, cache)
    levels = diffusers.source_levels()
    if (feeds := diffusers.feeds_of(bundle)) is not None:
        levels = merged(levels, "feeds", feeds)
    runs = not found.components.unverified and not found.pipeline.unverified and not found.pipeline.problem
    images = diffusers.images(bundle if runs else None, found.effort, found.budget.image_psnr_db)
    return merged(levels, "images", images)


def source_of(bundle: Bundle) -> str:
    """The model that a bundle was built from, as a `model` argument.

    Raises:
        InputError: it is not on this machine.
    """
    if bundle.manifest.source.id == REFERENCE:
        return REFERENCE
    path = str(bundle.manifest.measured.get("source_path", ""))
    if not is_name(path) and not model_folder(path or "?").is_dir():
        raise InputError(f"the source model {path or bundle.manifest.source.id} is not on this machine",
                         where=str(bundle.path), fix="give its folder with --against")
    return path
