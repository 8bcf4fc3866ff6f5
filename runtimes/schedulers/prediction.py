"""Computes the clean sample and the noise from a model's output, for each quantity a model can be trained to predict.

Everything here is in the variance-preserving form x_t = alpha x_0 + sigma noise, alpha^2 + sigma^2 = 1.
Every array is (B, C, H, W) float32, latents or noise; alpha and sigma are Python floats or float32, so that float32
stays float32.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from runtimes.schedulers.noise_levels import Float32

EPSILON, V_PREDICTION, SAMPLE = "epsilon", "v_prediction", "sample"
Level = float | np.float32


def to_original(kind: str, model_output: Float32, sample: Float32, alpha: Level, sigma: Level) -> Float32:
    """The clean sample x_0 that `model_output` implies; infinite for epsilon where alpha is 0.

    epsilon: Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239, eq. 15.
    v_prediction: v = alpha noise - sigma x_0, Salimans & Ho, Progressive Distillation, arXiv 2202.00512, appendix D.
    """
    if kind == EPSILON:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray((sample - sigma * model_output) / np.float32(alpha))
    if kind == V_PREDICTION:
        return alpha * sample - sigma * model_output
    return model_output


def to_epsilon(kind: str, model_output: Float32, sample: Float32, alpha: Level, sigma: Level) -> Float32:
    """The unit-variance noise that `model_output` implies; the sources are those of `to_original`."""
    if kind == EPSILON:
        return model_output
    if kind == V_PREDICTION:
        return alpha * model_output + sigma * sample
    return np.asarray((sample - alpha * model_output) / np.float32(sigma))


class Limits(Protocol):
    """The keys of diffusers' configs that limit the clean sample."""

    @property
    def thresholding(self) -> bool:
        """Whether it is limited by `dynamic_threshold`."""
        ...

    @property
    def dynamic_thresholding_ratio(self) -> float:
        """Its quantile."""
        ...

    @property
    def sample_max_value(self) -> float:
        """Its largest threshold."""
        ...


def limited(limits: Limits, original: Float32, clip: float | None = None) -> Float32:
    """`original` thresholded where `limits` asks for it, else clipped to -clip..clip unless None."""
    if limits.thresholding:
        return dynamic_threshold(original, limits.dynamic_thresholding_ratio, limits.sample_max_value)
    return original if clip is None else np.clip(original, np.float32(-clip), np.float32(clip))


def dynamic_threshold(original: Float32, ratio: float, largest: float) -> Float32:
    """Clip each sample to a quantile of its absolute values, 1 to `largest`, and divide by it: same shape.

    Saharia et al., Imagen, arXiv 2205.11487, section 2.3. The quantile is torch.quantile's, its rank in float32.
    """
    ordered = np.sort(np.abs(original).reshape(len(original), -1), axis=1)
    rank = np.float32(ratio) * np.float32(ordered.shape[1] - 1)
    low, high = ordered[:, int(np.floor(rank))], ordered[:, int(np.ceil(rank))]
    weight = np.float32(rank - np.floor(rank))
    quantile = low + weight * (high - low) if weight < 0.5 else high - (high - low) * (np.float32(1) - weight)
    bound = np.clip(quantile, np.float32(1), np.float32(largest)).reshape(-1, *[1] * (original.ndim - 1))
    return np.asarray(np.clip(original, -bound, bound) / bound, dtype=np.float32)
