"""Finds the folder that a build reads: the model's own, the Hub's copy, or a view of it with another autoencoder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from deploy.core.spec import REFERENCE, BuildSpec
from deploy.model import hub
from deploy.reference_models import WEIGHTS
from exporters.source.model_folder import MODEL_INDEX, read_json
from runtimes.bundle.folder import translated_disk_errors
from runtimes.bundle.manifest import digest_of
from runtimes.errors import InputError
from runtimes.system.cache_root import cache_home
from runtimes.system.cache_store import use

_VAE_NAMES = ("vae", "vqvae")


def model_folder(model: str, revision: str = "", variant: str = "", *, safety_checker: bool = False) -> Path:
    """The folder that a model argument names; one on the Hugging Face Hub is downloaded, if it is not in its cache.

    Args:
        model: a folder, OWNER/NAME on the Hub, or "reference".
        revision, variant, safety_checker: of a model on the Hub, see `deploy.model.hub.fetch`.

    Raises:
        InputError: the reference model is asked for and its weights are not in this installation; the Hub has no such
            model, or a folder is given with a revision.
        UnavailableError: the Hub cannot be reached.
    """
    if model != REFERENCE and hub.is_name(model):
        return hub.fetch(model, revision, variant, safety_checker).folder
    if revision:
        raise InputError("a revision is of a model on the Hub, this is a folder", where="--revision",
                         fix="leave it out, or give OWNER/NAME")
    if model != REFERENCE:
        return Path(model)
    if not WEIGHTS.is_dir():
        raise InputError("the reference model's weights are missing from this installation", where=str(WEIGHTS),
                         fix="install ldm-deploy again, or give a MODEL folder")
    return WEIGHTS


def own_folder(spec: BuildSpec) -> Path:
    """The folder of the model that a spec names, without what else it changes.

    Raises:
        InputError, UnavailableError: see `model_folder`.
    """
    return model_folder(spec.model, spec.revision, spec.variant, safety_checker=spec.safety_checker)


def source_folder(spec: BuildSpec) -> Path:
    """The diffusers folder that a spec builds from.

    Raises:
        InputError: it, or the autoencoder that replaces its own, cannot be used.
    """
    folder = own_folder(spec)
    return with_vae(folder, Path(spec.vae)) if spec.vae else folder


def with_vae(model: Path, vae: Path) -> Path:
    """A folder of links below the cache: the model's, with `vae` in place of its autoencoder.

    Args:
        model: diffusers pipeline folder.
        vae: folder with config.json and safetensors weights of an autoencoder.

    Raises:
        InputError: no autoencoder's folder, or a model without an autoencoder.
    """
    if not model.is_dir():
        return model  # refused by whoever reads it
    kind = read_json(vae / "config.json").get("_class_name")
    if not isinstance(kind, str):
        raise InputError("config.json names no _class_name", where=str(vae), fix="give a diffusers autoencoder folder")
    index = read_json(model / MODEL_INDEX)
    name = next((n for n in _VAE_NAMES if n in index), None)
    if name is None:
        raise InputError("the model has no autoencoder to replace", where=str(model), fix="leave --vae out")
    index[name] = ["diffusers", kind]
    view = cache_home() / "views" / digest_of([str(model.resolve()), str(vae.resolve()), index])
    with translated_disk_errors(view):
        view.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=view.parent))
        (partial / MODEL_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        for entry in model.iterdir():
            if entry.is_dir() and entry.name != name:
                (partial / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
        (partial / name).symlink_to(vae.resolve(), target_is_directory=True)
        if use(view):
            shutil.rmtree(partial)
        else:
            partial.rename(view)
    return view
