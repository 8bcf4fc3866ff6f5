"""Noise levels: betas, their cumulative product, sigmas, and which timesteps a run visits. No sampling here.

Notation, for a variance-preserving process x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1:
`alphas_cumprod[t]` is alpha_t^2, and `sigma` without an index is the noise-to-signal ratio sigma_t / alpha_t, the noise
level of the variance-exploding form x_t / alpha_t. The tables are float32 and reproduce diffusers' (torch's) rounding,
because 1 - alphas_cumprod[0] keeps only 3 to 4 digits of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

# Half-precision's smallest positive number: diffusers' stand-in for a zero alphas_cumprod, so that sigma stays finite.
ALMOST_ZERO_SNR = 2.0**-24


def make_betas(schedule: str, steps: int, start: float, end: float, trained: Sequence[float] | None = None) -> Float32:
    """Variance added at each training step: (num_train_timesteps,) float32, each in (0, 1).

    `linear` is DDPM's (Ho et al., arXiv 2006.11239), `scaled_linear` latent diffusion's (Rombach et al., 2112.10752),
    `squaredcos_cap_v2` the cosine schedule of Nichol & Dhariwal (2102.09672, eq. 17). `trained` replaces all three.
    """
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float32)
    elif min(start, end) <= 0:
        raise InputError("beta_start and beta_end must be positive", where="scheduler_config.json", fix="correct them")
    elif schedule == "linear":
        betas = _linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    else:
        cosine = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = np.array([min(1 - cosine[i + 1] / cosine[i], 0.999) for i in range(steps)], dtype=np.float32)
    if betas.shape != (steps,) or not np.all((betas > 0) & (betas < 1)):
        raise InputError(
            f"the noise schedule must hold {steps} betas between 0 and 1, both excluded",
            where="scheduler_config.json",
            fix="correct beta_start, beta_end, trained_betas or num_train_timesteps",
        )
    return betas


def _linspace(start: float, end: float, steps: int) -> Float32:
    """torch.linspace(dtype=float32): counted from both ends with a float32 increment and one rounding an element."""
    low, high = np.float64(np.float32(start)), np.float64(np.float32(end))
    increment = np.float64(np.float32((np.float32(end) - np.float32(start)) / np.float32(max(steps - 1, 1))))
    index = np.arange(steps)
    halves = np.where(index < max(steps // 2, 1), low + increment * index, high - increment * (steps - 1 - index))
    return halves.astype(np.float32)


def rescale_zero_terminal_snr(betas: Float32) -> Float32:
    """Shift and scale sqrt(alphas_cumprod) so that the last training step is pure noise (the first keeps its value).

    Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv 2305.08891, Algorithm 1.
    """
    root = np.sqrt(cumulative_alphas(betas))
    first, last = root[0], root[-1]
    product = ((root - last) * (first / (first - last))) ** 2
    return np.asarray(1 - np.concatenate([product[:1], product[1:] / product[:-1]]), dtype=np.float32)


def cumulative_alphas(betas: Float32) -> Float32:
    """alphas_cumprod, (num_train_timesteps,) float32: multiplied in float64 and rounded once, as torch.cumprod does."""
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def training_sigmas(alphas_cumprod: Float32, zero_snr: bool) -> Float32:
    """sqrt((1 - a) / a) of every training step, ascending: (num_train_timesteps,) float32."""
    if zero_snr:
        alphas_cumprod = np.append(alphas_cumprod[:-1], np.float32(ALMOST_ZERO_SNR))
    return np.asarray(np.sqrt((np.float32(1) - alphas_cumprod) / alphas_cumprod))


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> Float64:
    """Timesteps of a one-step method, descending: (steps,) float64, fractional for `linspace`.

    arXiv 2305.08891, Table 2. `trailing` may come out one too long when train_steps / steps is not exact in binary
    (61 of 1000, say); the excess timestep is a rounding artefact at -1 and is dropped.
    """
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps, dtype=np.float64) * (train_steps // steps))[::-1] + offset
    return np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1


def multistep_timesteps(spacing: str, steps: int, train_steps: int, offset: int, last: int) -> npt.NDArray[np.int64]:
    """Timesteps of DPM-Solver++ and UniPC, descending: (steps,) int64, the lowest of steps + 1 being left to the end.

    `last` is train_steps, or less where the lowest signal levels are cut off.
    """
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + offset
    return np.arange(last, 0, -train_steps / steps).round()[:steps].astype(np.int64) - 1


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, eq. 5."""
    rho = 7.0
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** rho)


def exponential_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Levels evenly spaced in log(sigma), descending: (steps,) float64."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps)))


def timesteps_of(sigmas: Float64, training: Float32) -> Float64:
    """Fractional training timesteps whose noise levels are `sigmas`, linear in log(sigma): same shape, float64."""
    logs, wanted = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[below] - wanted) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1))


def root(value: np.float32 | float) -> np.float32:
    """Square root, correctly rounded to float32, for coefficients that must round where diffusers' do."""
    return np.float32(np.sqrt(np.float32(value)))


def interpolated_sigmas(timesteps: npt.NDArray[np.floating | np.int64], training: Float32) -> Float64:
    """Noise levels at whole or fractional training timesteps: same shape, float64."""
    return np.asarray(np.interp(timesteps, np.arange(len(training)), training))
