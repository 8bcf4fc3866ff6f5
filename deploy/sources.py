"""The folder that a build reads: the model's own, or a view of it in which another autoencoder stands for its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from deploy.cache import default_root
from deploy.reference_model import WEIGHTS
from deploy.spec import REFERENCE, BuildSpec
from exporters.source import MODEL_INDEX, read_json
from runtimes.bundle import translated_disk_errors
from runtimes.cache_store import use
from runtimes.errors import InputError
from runtimes.manifest import digest_of

_VAE_NAMES = ("vae", "vqvae")


def model_folder(model: str) -> Path:
    """The folder that a model argument names.

    Raises:
        InputError: the reference model is asked for and its weights are not in this installation.
    """
    if model != REFERENCE:
        return Path(model)
    if not WEIGHTS.is_dir():
        raise InputError("the reference model's weights are missing from this installation", where=str(WEIGHTS),
                         fix="install ldm-deploy again, or give a MODEL folder")
    return WEIGHTS


def source_folder(spec: BuildSpec) -> Path:
    """The diffusers folder that a spec builds from.

    Raises:
        InputError: it, or the autoencoder that replaces its own, cannot be used.
    """
    folder = model_folder(spec.model)
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
    view = default_root() / "views" / digest_of([str(model.resolve()), str(vae.resolve()), index])
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
