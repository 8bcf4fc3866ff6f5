"""Keys of a single-file checkpoint that belong to no network: each is honoured, reported as left out, or refused.

Imports torch; import it inside the function that needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from exporters.quiet import quiet
from runtimes.errors import InputError
from runtimes.system.progress import listener

# Marker tensors without content, as ComfyUI (comfy/supported_models.py) and A1111 read them.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# The noise schedule and what follows from it, which CompVis registers as buffers (ldm/models/diffusion/ddpm.py).
_SCHEDULE = re.compile(r"(?:betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
                       r"log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|"
                       r"posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|lvlb_weights|logvar|"
                       r"log_snr|denoiser\.sigmas|denoiser\.log_sigmas|model\.alphas_cumprod)")
# Of training alone, or computed by the network itself; each with the words that name it.
_NAMED = {
    r"model_ema\.|first_stage_model\.model_ema\.": "averages of training (EMA): the weights themselves are taken, as "
                                                   "diffusers takes them",
    r"first_stage_model\.loss\.": "the loss that the autoencoder was trained with",
    r"(?:global_step|epoch|step|iteration)$": "how long it was trained",
    r"optimizer|lr_scheduler|scheduler_state": "the state of an optimizer",
}
_COMPUTED = re.compile(r"(?:cond_stage_model|conditioner)\..*(?:position_ids|logit_scale|attn_mask)$")
_TOLERANCE = 1e-4  # files store float16 or float32; other schedules differ by 1e-2 and more
_SHOWN = 3


def check_leftovers(left: Iterable[str], tensors: Mapping[str, Tensor], scheduler: Mapping[str, Any],
                    metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Decide on every key that no network took.

    Args:
        left: those keys.
        tensors: all of the file by key, weights of any shape and dtype.
        scheduler: scheduler_config.json of the configs.
        metadata: of the file; `modelspec.prediction_type` is read.
        where: the file, for errors.

    Returns:
        the scheduler's config as the file wants it.

    Raises:
        InputError: keys that ask for something not supported, or that contradict the configs.
    """
    keys, config = set(left), dict(scheduler)
    if V_PREDICTION in keys or metadata.get("modelspec.prediction_type") == "v":
        config = _changed(config, {"prediction_type": "v_prediction"}, "v_pred", where)
    elif metadata.get("modelspec.prediction_type") == "epsilon" and config.get("prediction_type") == "v_prediction":
        raise InputError("its metadata say prediction_type epsilon, the configs v_prediction", where=where,
                         fix="give --configs of this model")
    if ZERO_SNR in keys:
        config = _changed(config, _ZERO_SNR_KEYS, ZERO_SNR, where)
    schedule = {key for key in keys if _SCHEDULE.fullmatch(key)}
    config = _checked_schedule({key: tensors[key] for key in schedule}, config, where)
    keys -= {V_PREDICTION, ZERO_SNR, *schedule}
    keys = {key for key in keys if not _COMPUTED.fullmatch(key)}
    for pattern, meaning in _NAMED.items():
        if found := {key for key in keys if re.match(pattern, key)}:
            listener().finished(f"left out: {_some(found)}: {meaning}")
            keys -= found
    if keys:
        raise InputError(f"{_some(keys)} is of no network of the configs", where=where,
                         fix="give --configs of the architecture that the file has, or a file without it")
    return config


_ZERO_SNR_KEYS = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def untaken(tensors: Mapping[str, Tensor], networks: Iterable[Mapping[str, Tensor]]) -> set[str]:
    """Keys of the file whose memory no weight of the networks shares.

    Args:
        tensors: of the file by key, any shape and dtype, each with memory of its own.
        networks: weights under diffusers' names: the file's tensors, views of them or copies.
    """
    taken = {weight.untyped_storage().data_ptr() for network in networks for weight in network.values()}
    return {key for key, tensor in tensors.items() if tensor.untyped_storage().data_ptr() not in taken}


def _changed(config: Mapping[str, Any], wanted: Mapping[str, Any], marker: str, where: str,
             ) -> dict[str, Any]:
    """The scheduler's config with what a marker asks for.

    Raises:
        InputError: the scheduler's class has no such key.
    """
    import inspect

    import diffusers

    with quiet():
        kind = getattr(diffusers, str(config.get("_class_name")), None)
    known = set(inspect.signature(kind.__init__).parameters) if kind is not None else set()
    if unknown := sorted(set(wanted) - known):
        raise InputError(f"its key {marker} asks for {unknown[0]}, which {config.get('_class_name')} does not have",
                         where=where, fix="name EulerDiscreteScheduler or DDIMScheduler in the configs")
    changed = {key: value for key, value in wanted.items() if config.get(key) != value}
    if changed:
        listener().finished(
            f"the key {marker} sets {', '.join(f'{k} = {v}' for k, v in changed.items())} of the scheduler")
    return {**config, **changed}


def _checked_schedule(found: Mapping[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config, whose noise schedule must be the file's; a file with zero terminal SNR asks for it.

    Raises:
        InputError: the schedules differ.
    """
    given = {key: value for key, value in found.items()
             if key.removeprefix("model.") in ("betas", "alphas_cumprod", "denoiser.sigmas")}
    for key, value in sorted(given.items()):
        if _agrees(key, value, config):
            continue
        zero = {**config, **_ZERO_SNR_KEYS}
        if not config.get("rescale_betas_zero_snr") and _agrees(key, value, zero):
            config = _changed(config, _ZERO_SNR_KEYS, key, where)
        else:
            raise InputError(f"{key} is another noise schedule than the configs' scheduler_config.json has",
                             where=where, fix="give --configs of this model, with its beta_start and beta_end")
    return config


def _agrees(key: str, value: Tensor, config: Mapping[str, Any]) -> bool:
    from runtimes.schedulers.settings import Settings

    table = Settings.from_config({**config, "prediction_type": "v_prediction"}).alphas_cumprod
    alphas = torch.from_numpy(table.copy()).double()
    wanted = {"betas": 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]]),
              "alphas_cumprod": alphas, "denoiser.sigmas": ((1 - alphas) / alphas.clamp_min(1e-12)).sqrt()}
    expected, numbers = wanted[key.removeprefix("model.")], value.double().flatten()
    if key == "denoiser.sigmas" and len(numbers) == len(expected) and numbers[0] > numbers[-1]:
        numbers = numbers.flip(0)
    return len(numbers) == len(expected) and bool(
        torch.allclose(numbers, expected, rtol=10 * _TOLERANCE, atol=_TOLERANCE))


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
