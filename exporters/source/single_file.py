"""Converts one .safetensors file in the layout of CompVis and A1111 to a diffusers folder, with configs that are given.

diffusers knows how the names correspond; nothing is downloaded, and a pickle (.ckpt) is never opened. Imports torch;
import it inside the function that needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.quiet import quiet
from exporters.source.leftover_keys import check_leftovers, untaken
from exporters.source.model_folder import MODEL_INDEX, read_json
from exporters.source.networks import empty_module
from runtimes.bundle.folder import committed
from runtimes.bundle.safetensors_reader import read_header, read_metadata
from runtimes.errors import InputError

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
_SCHEDULER = "scheduler/scheduler_config.json"
_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def convert_single_file(checkpoint: Path, configs: Path, out: Path) -> Path:
    """Write a pipeline folder that `build` takes.

    Args:
        checkpoint: safetensors file that holds all networks.
        configs: a diffusers folder of the same architecture, whose model_index.json, configs, tokenizers and scheduler
            are taken; weights in it are not looked at.
        out: the folder to write; appears by rename when it is whole.

    Returns:
        `out`.

    Raises:
        InputError: a pickle, another layout, configs that are missing or describe another network, keys that ask
            for something not supported.
        UnavailableError: the disk is full.
    """
    if checkpoint.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError("a pickle, which can run code when it is read: refused", where=str(checkpoint),
                         fix="get the .safetensors file of this model")
    if not checkpoint.is_file():
        raise InputError("no such file", where=str(checkpoint), fix="give a .safetensors file")
    header = read_header(checkpoint)
    for prefix, network in ((UNET_PREFIX, "U-Net"), (VAE_PREFIX, "VAE")):
        if not any(key.startswith(prefix) for key in header):
            raise InputError(f"it holds no {network}: no key begins with {prefix} (the first is "
                             f"{next(iter(header), 'none')})", where=str(checkpoint),
                             fix="give a whole checkpoint; an adapter or a single network is not one")
    index = read_json(configs / MODEL_INDEX)
    networks = {name: entry for name, entry in index.items() if _is_network(configs, name, entry)}
    with committed(out) as folder, _opened(checkpoint) as tensors:
        converted = [_write(folder / name, configs, entry, tensors, checkpoint) for name, entry in networks.items()]
        left = _without_copied(untaken(tensors, converted), converted)
        scheduler = check_leftovers(left, tensors, read_json(configs / _SCHEDULER), read_metadata(checkpoint),
                                    str(checkpoint))
        for name, entry in index.items():
            if isinstance(entry, list) and name not in networks and (configs / name).is_dir():
                shutil.copytree(configs / name, folder / name)
        (folder / _SCHEDULER).unlink()  # a copy that may share the mode of its original
        (folder / _SCHEDULER).write_text(json.dumps(scheduler, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        used = {n: e for n, e in index.items() if not isinstance(e, list) or (folder / n).is_dir()}
        (folder / MODEL_INDEX).write_text(json.dumps(used, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def _without_copied(left: set[str], networks: list[Mapping[str, Tensor]]) -> set[str]:
    """Without what diffusers copies or knows to be unused: queries, keys and values of OpenCLIP, which it takes apart,
    projections of text, and the last layer of OpenCLIP, which Stable Diffusion 2 does without."""
    from diffusers.loaders import single_file_utils as utils

    projects = any("text_projection.weight" in network for network in networks)

    def known(key: str) -> bool:
        if ".attn.in_proj_" in key:
            return key.partition("in_proj_")[0] + "out_proj.weight" not in left
        if key.endswith(("text_projection", "text_projection.weight")):
            return projects or key.startswith("cond_stage_model.")
        return key in utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    return {key for key in left if not known(key)}


def _is_network(configs: Path, name: str, entry: Any) -> bool:
    """True for what such a file holds: U-Net, VAE and CLIP text encoders."""
    return isinstance(entry, list) and (configs / name / "config.json").is_file() and (
        name in ("unet", "vae") or name.startswith("text_encoder"))


@contextmanager
def _opened(file: Path) -> Iterator[dict[str, Tensor]]:
    """Every tensor of the file, memory-mapped."""
    from safetensors import safe_open

    with safe_open(file, framework="pt", device="cpu") as tensors:
        yield {key: tensors.get_tensor(key) for key in tensors.keys()}


def _write(folder: Path, configs: Path, entry: list[str], tensors: Mapping[str, Tensor], checkpoint: Path,
           ) -> Mapping[str, Tensor]:
    """One network: its config, and its weights under diffusers' names, which must be exactly those of its class."""
    from safetensors.torch import save_file

    name, (library, class_name) = folder.name, entry
    library = "transformers" if library == "transformers" else "diffusers"
    config = read_json(configs / name / "config.json")
    try:
        with quiet():
            weights = _renamed(name, class_name, config, configs, dict(tensors))
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"the {name} of this file is not what the configs describe: {type(error).__name__}: "
                         f"{str(error).partition(chr(10))[0]:.200}", where=str(checkpoint),
                         fix="give --configs of the architecture that the file has") from error
    folder.mkdir()
    shutil.copyfile(configs / name / "config.json", folder / "config.json")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / _WEIGHTS[library])
    try:
        empty_module(folder, library, class_name)
    except InputError as error:
        raise InputError(f"the {name} of this file is not what the configs describe: {error.what}",
                         where=str(checkpoint), fix="give --configs of the architecture that the file has") from error
    return weights


def _renamed(
    name: str, class_name: str, config: dict[str, Any], configs: Path, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of one network under diffusers' names."""
    from diffusers.loaders import single_file_utils as utils

    if name == "unet":
        return dict(utils.convert_ldm_unet_checkpoint(tensors, config))
    if name == "vae":
        return dict(utils.convert_ldm_vae_checkpoint(tensors, config))
    import transformers

    model = utils.create_diffusers_clip_model_from_ldm(
        getattr(transformers, class_name), tensors, subfolder=name, config=str(configs), local_files_only=True)
    weights: dict[str, Tensor] = model.state_dict()
    if empty := [key for key, tensor in weights.items() if tensor.device == torch.device("meta")]:
        raise ValueError(f"the file lacks {empty[0]}")
    return weights
