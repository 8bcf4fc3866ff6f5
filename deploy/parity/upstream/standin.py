"""A stand-in for a denoiser that costs nothing: one fixed smooth function of all its inputs. No torch.

Both sides of the *feeds* level call it, so whatever they do differently shows: a wrong timestep or condition in the
call itself, wrong guidance or a wrong sampler in the sample of the next call. A constant or random noise would hide the
latter. Each input reaches the result through its own weights, and the result is of about unit variance, as predicted
noise is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SAMPLE, TIMESTEP = "sample", "timestep"
# Shares of the result: of the sample itself, of the timestep, and of all other inputs together.
SAMPLE_SHARE, TIME_SHARE, CONDITION_SHARE = 0.7, 0.2, 0.5


def stand_in(feeds: Mapping[str, Array], channels: int) -> NDArray[np.float32]:
    """What the stand-in predicts.

    Args:
        feeds: `sample` (B, C, H, W), noisy latents, `timestep` (B,) or a single number, and any conditions (B, ...),
            all of any real dtype; computed in float64.
        channels: of the result.

    Returns:
        (B, channels, H, W) float32, smooth in every input, at most about 1.5 in magnitude.
    """
    sample = feeds[SAMPLE].astype(np.float64)
    rows, inner, height, width = sample.shape
    times = np.broadcast_to(feeds[TIMESTEP].astype(np.float64).reshape(-1), (rows,))
    out = np.arange(1, channels + 1)
    mixing = np.cos(0.9 * np.outer(out, np.arange(inner)) + 0.3 * out[:, None]) / np.sqrt(max(inner, 1) / 2)
    result = SAMPLE_SHARE * _bounded(np.einsum("oc,bchw->bohw", mixing, sample))
    result += TIME_SHARE * np.sin(0.01 * times[:, None] + out)[:, :, None, None]
    conditions = sorted(set(feeds) - {SAMPLE, TIMESTEP})
    ramp = np.linspace(0, 2, height)[:, None] + np.linspace(0, 3, width)
    for number, name in enumerate(conditions, 1):
        weight = _projected(feeds[name].astype(np.float64).reshape(rows, -1), out + 10 * number)
        result += CONDITION_SHARE / len(conditions) * np.sin(weight[:, :, None, None] + ramp)
    return result.astype(np.float32)


def _bounded(values: Array) -> Array:
    bounded: Array = values / np.sqrt(1 + values**2)
    return bounded


def _projected(values: Array, phases: Array) -> Array:
    """(B, n) -> (B, len(phases)): every number counts, with another weight for each phase."""
    n = values.shape[1]
    weights = np.cos(0.7 * np.arange(n)[:, None] + 0.37 * np.outer(np.arange(n) % 101, phases)) / np.sqrt(max(n, 1))
    projected: Array = _bounded(values / 10) @ weights * 10
    return projected
