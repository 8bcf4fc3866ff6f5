"""Noise schedules: betas, their cumulative product, noise levels (sigmas), and which timesteps a run visits.

Notation, for a variance-preserving process x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1:
`alphas_cumprod[t]` is alpha_t^2, and `sigma` without an index is the noise-to-signal ratio sigma_t / alpha_t, the noise
level of the variance-exploding form x_t / alpha_t. The tables are float32 and reproduce diffusers' (torch's) rounding,
because 1 - alphas_cumprod[0] keeps only 3 to 4 digits of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from runtimes.errors import InputError
from runtimes.schedulers.beta_quantile import beta_quantile

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]


def _cosine(t: float) -> float:
    """Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672, eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Hang et al., Improved Noise Schedule for Diffusion Training, arXiv 2407.03297, table 1, with diffusers' scale."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


def _exponential(t: float) -> float:
    """As diffusers' HeunDiscreteScheduler has it: the signal's variance falls by e^12."""
    return math.exp(t * -12.0)


# Share of signal variance left at time t in [0, 1], for the schedules that are defined by it.
SIGNAL_SHARES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}
)

# Half-precision's smallest positive number: diffusers' stand-in for a zero alphas_cumprod, so that sigma stays finite.
ALMOST_ZERO_SNR = 2.0**-24


def make_betas(schedule: str, steps: int, start: float, end: float, trained: Sequence[float] | None = None) -> Float32:
    """Variance added at each training step: (num_train_timesteps,) float32, each in (0, 1).

    `linear` is DDPM's (Ho et al., arXiv 2006.11239), `scaled_linear` latent diffusion's (Rombach et al., 2112.10752),
    `sigmoid` GeoDiff's (Xu et al., 2203.02923); the others are in `SIGNAL_SHARES`. `trained` replaces them all.

    Raises:
        InputError: a number of betas other than `steps`, or one that is not between 0 and 1.
    """
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float32)
    elif schedule in SIGNAL_SHARES:
        share = [SIGNAL_SHARES[schedule](i / steps) for i in range(steps + 1)]
        betas = np.array([min(1 - share[i + 1] / share[i], 0.999) for i in range(steps)], dtype=np.float32)
    elif min(start, end) <= 0:
        raise InputError("beta_start and beta_end must be positive", where="scheduler_config.json", fix="correct them")
    elif schedule == "linear":
        betas = linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = linspace(start**0.5, end**0.5, steps) ** 2
    else:
        sigmoid = (1 / (1 + np.exp(-linspace(-6, 6, steps).astype(np.float64)))).astype(np.float32)
        betas = sigmoid * np.float32(end - start) + np.float32(start)
    if betas.shape != (steps,) or not np.all((betas > 0) & (betas < 1)):
        raise InputError(
            f"the noise schedule must hold {steps} betas between 0 and 1, both excluded",
            where="scheduler_config.json",
            fix="correct beta_start, beta_end, trained_betas or num_train_timesteps",
        )
    return betas


def linspace(start: float, end: float, steps: int) -> Float32:
    """torch.linspace: (steps,) float32 from `start` to `end`, any quantity.

    Counted from both ends with a float32 increment and one rounding an element, as torch does.
    """
    low, high = np.float64(np.float32(start)), np.float64(np.float32(end))
    increment = np.float64(np.float32((np.float32(end) - np.float32(start)) / np.float32(max(steps - 1, 1))))
    index = np.arange(steps)
    halves = np.where(index < max(steps // 2, 1), low + increment * index, high - increment * (steps - 1 - index))
    return halves.astype(np.float32)


def rescale_zero_terminal_snr(betas: Float32) -> Float32:
    """Shift and scale sqrt(alphas_cumprod) so that the last training step is pure noise (the first keeps its value).

    Betas (num_train_timesteps,) float32 -> the same.
    Lin et al., Common Diffusion Noise Schedules and Sample Steps Are Flawed, arXiv 2305.08891, Algorithm 1.
    """
    root = np.sqrt(cumulative_alphas(betas))
    first, last = root[0], root[-1]
    product = ((root - last) * (first / (first - last))) ** 2
    return np.asarray(1 - np.concatenate([product[:1], product[1:] / product[:-1]]), dtype=np.float32)


def cumulative_alphas(betas: Float32) -> Float32:
    """alphas_cumprod, the share of signal variance left: (num_train_timesteps,) float32, as are the betas.

    Multiplied in float64 and rounded once, as torch.cumprod does.
    """
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def training_sigmas(alphas_cumprod: Float32, zero_snr: bool) -> Float32:
    """Noise level sqrt((1 - a) / a) of every training step, ascending: (num_train_timesteps,) float32."""
    if zero_snr:
        alphas_cumprod = np.append(alphas_cumprod[:-1], np.float32(ALMOST_ZERO_SNR))
    return np.asarray(np.sqrt((np.float32(1) - alphas_cumprod) / alphas_cumprod))


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int) -> Float64:
    """Timesteps of a one-step method, descending: (steps,) float64, fractional for `linspace`.

    arXiv 2305.08891, Table 2. Where train_steps / steps is not exact in binary (61 of 1000, say), diffusers' `trailing`
    has one timestep more, at -1; so has this one.
    """
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps, dtype=np.float64) * (train_steps // steps))[::-1] + offset
    return np.round(np.arange(train_steps, 0, -train_steps / steps)) - 1


def multistep_timesteps(spacing: str, steps: int, train_steps: int, offset: int, last: int) -> npt.NDArray[np.int64]:
    """Timesteps of the solvers in lambda, descending: (steps,) int64, the lowest of steps + 1 being left to the end.

    `last` is train_steps, or less where the lowest signal levels are cut off. `trailing`: see `spaced_timesteps`.
    """
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + offset
    return np.arange(last, 0, -train_steps / steps).round().astype(np.int64) - 1


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Noise levels evenly spaced in sigma^(1/7), descending: (steps,) float64.

    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, eq. 5.
    """
    rho = 7.0
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** rho)


def exponential_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Levels evenly spaced in log(sigma), descending: (steps,) float64."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps)))


def beta_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Levels at quantiles of Beta(0.6, 0.6), descending: (steps,) float64.

    Lee et al., Beta Sampling is All You Need, arXiv 2407.12173.
    """
    return np.asarray(sigma_min + beta_quantile(1 - np.linspace(0, 1, steps), 0.6) * (sigma_max - sigma_min))


def lu_sigmas(training: Float32, steps: int) -> Float64:
    """Noise levels evenly spaced in lambda over those of `training`, descending: (steps,) float64.

    Lu et al., DPM-Solver, arXiv 2206.00927, section 3.4.
    """
    logs = np.log(training)
    high, low = float(logs[-1]), float(logs[0])
    return np.asarray(np.exp(high + np.linspace(0, 1, steps) * (low - high)))


def timesteps_of(sigmas: Float64, training: Float32) -> Float64:
    """Fractional training timesteps whose noise levels are `sigmas`, linear in log(sigma): same shape, float64."""
    logs, wanted = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[below] - wanted) / (logs[below] - logs[below + 1]), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1))


def interpolated_sigmas(timesteps: npt.NDArray[np.floating | np.int64], training: Float32) -> Float64:
    """Noise levels at whole or fractional training timesteps: same shape, float64."""
    return np.asarray(np.interp(timesteps, np.arange(len(training)), training))
