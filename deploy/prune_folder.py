"""`prune`: a smaller model as a diffusers folder, for those who go on in PyTorch; no bundle."""

from __future__ import annotations

from pathlib import Path

from deploy.builder import Listener, Silent, run_passes, workspace
from deploy.cache import Cache, default_root, rooted
from deploy.origin import open_origin
from deploy.passes import PASSES
from deploy.plan import Step, Unavailable, load_passes, plan_all
from deploy.spec import BuildSpec
from runtimes.bundle import check_output, committed, link_or_copy, translated_disk_errors
from runtimes.errors import InputError
from runtimes.manifest import Component

STAGES = ("load", "prune", "recover")
PRUNED_FILE = "diffusion_pytorch_model.safetensors"


def prune_folder(spec: BuildSpec, output: Path, *, progress: Listener | None = None,
                 cache_root: Path | None = None) -> Component:
    """Prune a model, let it recover, compare it with the original and write it in the layout it came in.

    Args:
        spec: what to prune; targets and precisions do not matter here.
        output: the new folder; `StableDiffusionPipeline.from_pretrained(output)` loads it.
        progress: told what happens.
        cache_root: where finished stages are kept; default `~/.cache/ldm-deploy`.

    Returns:
        the record of the pruned network.

    Raises:
        InputError: nothing is to be pruned, or the ratio does not fit the model.
        ParityError: the pruned network breaks the budget.
        UnavailableError: torch-pruning is not installed.
    """
    if not spec.prunes:
        raise InputError("nothing is to be pruned", where="prune", fix="give --prune, --prune-blocks or --mask")
    check_output(output)
    origin = open_origin(spec)
    planned = plan_all(load_passes({name: PASSES[name] for name in STAGES}), origin.manifest, spec)
    for entry in planned:
        if isinstance(entry.planned, Unavailable):
            entry.planned.raise_error()
    cache = Cache(cache_root or default_root())
    with translated_disk_errors(cache.root), rooted(cache.root), workspace(cache.root) as work:
        bundle, _ = run_passes(spec, origin, planned, cache, work, progress or Silent())
        changed = {name for entry in planned[1:] if isinstance(entry.planned, Step) for name in entry.planned.reads}
        with committed(output) as folder:
            for file in sorted(p for p in origin.path.rglob("*") if p.is_file()):
                name = file.relative_to(origin.path)
                if name.parts[0] not in changed:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(file, folder / name)
            for part in changed & set(bundle.manifest.components):
                component = bundle.component(part)
                (folder / part).mkdir()
                for file_name in component.files:
                    diffusers_name = PRUNED_FILE if file_name == component.file else Path(file_name).name
                    link_or_copy(bundle.path / file_name, folder / part / diffusers_name)
    return bundle.component("unet")
