"""Loads a component as a PyTorch module, strictly, from the file layouts of old and new releases.

`exporters.source.named_inputs` gives such a module the inputs and outputs of its graph.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.quiet import one_line, quiet
from exporters.source.model_folder import read_json
from exporters.source.named_inputs import WRAPPERS
from exporters.source.weight_files import canonical_weights, find_weights
from runtimes.bundle.roles import Role
from runtimes.bundle.safetensors_reader import read_header
from runtimes.errors import InputError

# What diffusers < 0.13 called the parts of an attention block of the VAE.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# transformers < 5, and all published checkpoints, put the text encoder's weights below this name,
_OLD_PREFIX = "text_model."
# and a vision encoder's below its own name once more.
_OLD_VISION, _VISION = "vision_model.vision_model.", "vision_model."
# Networks that their library does not export at its top level.
_ELSEWHERE = {"LDMBertModel": "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
              "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker"}
_SHOWN = 3


def load_module(folder: Path, library: str, class_name: str, *, dtype: torch.dtype = torch.float32,
                check: bool = True) -> nn.Module:
    """Build a component and fill it from its safetensors files.

    Nothing is initialized at random: the module is made without storage and takes over the memory-mapped tensors,
    so weights already stored in `dtype` are never copied.

    Args:
        folder: holds config.json and the weights, in the layout of any release of diffusers or transformers.
        library: "diffusers" or "transformers".
        class_name: as in model_index.json.
        dtype: of the floating-point weights of the result; the parity reference is float32.
        check: refuse what is not finite, which reads every weight; needless where it was done before.

    Returns:
        the module in eval mode, without gradients.

    Raises:
        InputError: an unknown class, a weight of the file that the model has no place for, a weight of the model
            that the file lacks, shapes that differ, or a NaN or infinity.
    """
    from safetensors import safe_open

    module, places = empty_module(folder, library, class_name)
    wanted, found = module.state_dict(), dict[str, Tensor]()
    for file in dict.fromkeys(place.file for place in places.values()):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name, place in places.items():
                if place.file == file:
                    found[name] = _fitted(tensors.get_tensor(place.key), wanted[name], place.key, folder, dtype, check)
    return filled(module, found)


@dataclass(frozen=True)
class Place:
    """Where a weight of a model lies: the safetensors file and the key in it."""

    file: Path
    key: str


def empty_module(folder: Path, library: str, class_name: str) -> tuple[nn.Module, dict[str, Place]]:
    """A component without storage, and where each of its weights lies; no weight is read.

    Raises:
        InputError: an unknown class, a weight of the file that the model has no place for, a weight of the model
            that the file lacks, or shapes that differ.
    """
    config = read_json(folder / "config.json")
    with quiet():
        module = empty_network(folder, library, class_name, config)
    wanted = dict(module.state_dict())
    recomputed = {name for name, _ in module.named_buffers()} - set(wanted)
    places: dict[str, Place] = {}
    unused: list[str] = []
    for file in (canonical_weights(folder) or find_weights(folder, library))[0]:
        for key, entry in sorted(read_header(file).items()):
            target = _target(key, wanted)
            if target is not None and target not in places:
                _check_shape(key, tuple(entry["shape"]), tuple(wanted[target].shape), folder)
                places[target] = Place(file, key)
            elif target is not None or not _is_recomputed(key, recomputed):
                unused.append(key)
    _refuse_misfits(folder, class_name, unused, sorted(set(wanted) - set(places) - _tied(module, places)))
    return module, places


def check_weights(folder: Path, library: str, class_name: str) -> None:
    """Look at every weight of a component once, one in memory at a time.

    Raises:
        InputError: as `load_module`.
    """
    from safetensors import safe_open

    module, places = empty_module(folder, library, class_name)
    wanted = module.state_dict()
    for name, place in places.items():
        with safe_open(place.file, framework="pt", device="cpu") as tensors:  # anew: its end unmaps what was read
            _fitted(tensors.get_tensor(place.key), wanted[name], place.key, folder, wanted[name].dtype)


def filled(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module with these weights in place, not copied, in eval mode and without gradients.

    Args:
        module: from `empty_module`.
        weights: by the module's own names, each of the original shape; their dtype becomes the module's.
    """
    module.load_state_dict(weights, strict=False, assign=True)
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    return module.eval().requires_grad_(False)


def empty_network(folder: Path, library: str, class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A network from its config alone: parameters on the meta device, buffers that no file holds computed for real.

    Args:
        folder: holds config.json, which transformers reads for itself.
        library: "diffusers" or "transformers".
        class_name: as in model_index.json.
        config: what config.json holds.

    Raises:
        InputError: an unknown class, or a config that it cannot be built from.
    """
    from accelerate import init_empty_weights

    known = library in ("diffusers", "transformers")  # nothing else is imported on a model's word
    kind = getattr(importlib.import_module(_ELSEWHERE.get(class_name, library)), class_name, None) if known else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{class_name} of {library!r} is not a network that the installed version knows",
                         where=str(folder), fix="upgrade diffusers and transformers")
    make: Any = kind
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(make, "from_config"):
                module: nn.Module = make.from_config(dict(config))
            else:  # a CLIP text encoder's config may lie in that of the whole CLIP: transformers looks for it
                module = make(make.config_class.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:  # whatever the classes of both libraries raise over a value that they cannot use
        raise InputError(f"{class_name} cannot be built from its config: {one_line(error)}",
                         where=str(folder / "config.json"), fix="save the pipeline again") from error
    return module


def _target(key: str, wanted: Mapping[str, Tensor]) -> str | None:
    """The model's name of a weight of the file, or None."""
    candidates = list(_old_and_new(key))
    candidates += [key.replace(old, new) for old, new in _OLD_ATTENTION.items() if old in key]
    return next((name for name in candidates if name in wanted), None)


def _is_recomputed(key: str, recomputed: set[str]) -> bool:
    """True for buffers that old files hold and the model computes itself (`embeddings.position_ids`)."""
    return not recomputed.isdisjoint(_old_and_new(key))


def _old_and_new(key: str) -> tuple[str, ...]:
    """What a weight may be called by releases of transformers."""
    return key, key.removeprefix(_OLD_PREFIX), _OLD_PREFIX + key, key.replace(_OLD_VISION, _VISION)


def _finite(tensor: Tensor) -> bool:
    """By its ends, which are NaN if anything is: one look at the memory, where torch.isfinite makes copies."""
    ends = torch.stack(torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float()))
    return bool(torch.isfinite(ends).all())


def _fitted(tensor: Tensor, place: Tensor, key: str, folder: Path, dtype: torch.dtype, check: bool = True) -> Tensor:
    """A tensor of the file in the shape and dtype of its place, checked to be finite."""
    tensor = tensor.reshape(place.shape)
    if place.is_floating_point():
        if not tensor.is_floating_point():
            raise InputError(f"{key} is {tensor.dtype}, expected floating point", where=str(folder),
                             fix="use unquantized weights")
        if check and tensor.numel() and not _finite(tensor):
            kind = "NaN" if torch.isnan(tensor.float()).any() else "infinity"
            raise InputError(f"{key} holds {kind}", where=str(folder), fix="the model is broken: get its weights again")
        tensor = tensor.to(dtype)
    return tensor


def _check_shape(key: str, found: tuple[int, ...], wanted: tuple[int, ...], folder: Path) -> None:
    if found not in (wanted, (*wanted, 1, 1)):  # old attention blocks stored 1x1 convolutions
        raise InputError(f"{key} has shape {found}, the config asks for {wanted}", where=str(folder),
                         fix="use the config.json that belongs to these weights")


def _tied(module: nn.Module, found: Mapping[str, Any]) -> set[str]:
    """Names that the model fills itself from another weight that was found."""
    tied = getattr(module, "_tied_weights_keys", None)
    return {name for name, other in tied.items() if other in found} if isinstance(tied, dict) else set()


def _refuse_misfits(folder: Path, class_name: str, unused: list[str], missing: list[str]) -> None:
    def some(keys: list[str]) -> str:
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        return ", ".join(keys[:_SHOWN]) + more

    problems = []
    if missing:
        problems.append(f"the file lacks {some(missing)}")
    if unused:
        problems.append(f"{class_name} has no place for {some(sorted(unused))}")
    if problems:
        raise InputError("the weights do not fit the model: " + "; ".join(problems), where=str(folder),
                         fix="use weights and config.json of the same model")


def torch_component(role: Role, module: nn.Module, outputs: Sequence[str] = ()) -> nn.Module:
    """The function of a component: named inputs in order, a tuple of outputs, exactly what is exported.

    Args:
        role: of the component in the bundle; the image encoder and decoder share one autoencoder.
        module: from `load_module`.
        outputs: what the network calls the outputs, of which text encoders have several to choose from.

    Returns:
        a module in eval mode that shares the weights; of a VAE it holds only the half that the component uses.
    """
    return WRAPPERS[role](module, tuple(outputs)).eval()
