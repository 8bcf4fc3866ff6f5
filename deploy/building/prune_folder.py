"""Runs `prune`: writes a smaller model as a diffusers folder, for those who go on in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deploy.building.builder import run_passes, workspace
from deploy.core.pass_cache import Cache
from deploy.core.plan import Step, Unavailable, load_passes, plan_all
from deploy.core.spec import BuildSpec
from deploy.model.source_bundle import VAE_HALVES, open_origin
from deploy.passes import PASSES
from runtimes.bundle.folder import Bundle, check_output, committed, link_or_copy, translated_disk_errors
from runtimes.bundle.manifest import Component
from runtimes.errors import InputError
from runtimes.system.cache_root import cache_home, rooted

STAGES = ("load", "prune-vae", "prune", "recover")
PRUNED_FILE = "diffusion_pytorch_model.safetensors"


def prune_folder(spec: BuildSpec, output: Path, *, cache_root: Path | None = None) -> dict[str, Component]:
    """Prune a model, let it recover, compare it with the original and write it in the layout it came in.

    Args:
        spec: what to prune; targets and precisions do not matter here.
        output: the new folder; `StableDiffusionPipeline.from_pretrained(output)` loads it.
        cache_root: where finished stages are kept; default `runtimes.system.cache_root.cache_home()`.

    Returns:
        the records of the pruned networks by name.

    Raises:
        InputError: nothing is to be pruned, or a ratio does not fit the model.
        ParityError: a pruned network breaks the budget.
        UnavailableError: torch-pruning is not installed.
    """
    if not spec.prunes:
        raise InputError("nothing is to be pruned", where="prune",
                         fix="give --prune, --prune-vae, --prune-blocks or --mask")
    if spec.prune_candidates:
        raise InputError("a folder has one share of channels", where="--prune",
                         fix="name one; `build` chooses among several")
    check_output(output)
    origin = open_origin(spec)
    planned = plan_all(load_passes({name: PASSES[name] for name in STAGES}), origin.manifest, spec)
    for entry in planned:
        if isinstance(entry.planned, Unavailable):
            entry.planned.raise_error()
    cache = Cache(cache_root or cache_home())
    with translated_disk_errors(cache.root), rooted(cache.root), workspace(cache.root) as work:
        bundle, _ = run_passes(spec, origin, planned, cache, work)
        names = {name for entry in planned[1:] if isinstance(entry.planned, Step) for name in entry.planned.reads}
        changed = {name: bundle.component(name) for name in sorted(names & set(bundle.manifest.components))}
        parts = {part: {name: c for name, c in changed.items() if c.details.source_component == part}
                 for part in {c.details.source_component for c in changed.values()}}
        with committed(output) as folder:
            for file in sorted(p for p in origin.path.rglob("*") if p.is_file()):
                name = file.relative_to(origin.path)
                if name.parts[0] not in parts:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(file, folder / name)
            for part, components in parts.items():
                (folder / part).mkdir()
                _write_part(bundle, components, folder / part)
    return changed


def _write_part(bundle: Bundle, components: Mapping[str, Component], folder: Path) -> None:
    """One network of the pipeline, of whose components each has the weights that it uses."""
    first = next(iter(components.values()))
    for file_name in first.files:
        if file_name != first.file:
            link_or_copy(bundle.path / file_name, folder / Path(file_name).name)
    if len(components) == 1:
        link_or_copy(bundle.file(first.file), folder / PRUNED_FILE)
        return
    from safetensors.torch import load_file, save_file

    halves = {name: VAE_HALVES[bundle.manifest.pipeline.role(name)] for name in components}
    weights = {key: tensor for name, component in components.items()
               for key, tensor in load_file(bundle.file(component.file)).items() if key.startswith(halves[name])}
    save_file(weights, folder / PRUNED_FILE, {"format": "pt"})
