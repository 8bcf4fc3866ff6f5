"""Classifier-free guidance, Ho & Salimans, arXiv 2207.12598: when a step is guided, how two predictions become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Guidance:
    """How strongly and when the prompt is followed.

    Attributes:
        scale: guidance scale; at 1 and below guidance is off.
        rescale: share in which the guided prediction takes the deviation of the prompt's own, 0 to 1: section 3.4 of
            Lin et al., arXiv 2305.08891, against overexposure.
        interval: first and last share of the steps under guidance; outside of it a step costs half. Kynkäänniemi et
            al., Applying Guidance in a Limited Interval, arXiv 2404.07724: at high noise guidance costs variety, at low
            noise it does nothing. Counted in steps as diffusers' guiders do.
        below_one: whether every scale but 1 guides; see `runtimes.bundle.roles.GuidanceRole`.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    below_one: bool = False

    @property
    def on(self) -> bool:
        """Whether any step can be guided."""
        return self.scale > 1 or (self.below_one and self.scale != 1)

    def active(self, i: int, total: int) -> bool:
        """Whether step i of `total` is guided."""
        first, last = self.interval
        return self.on and int(first * total) <= i < int(last * total)

    def combine(self, uncond: Float32, cond: Float32) -> Float32:
        """The guided prediction, eq. 6 with w = scale - 1 as diffusers counts it: (B, C, H/f, W/f) float32 each.

        `cond` is overwritten with the result: it is the network's output, which nobody else holds.
        """
        wanted = _deviation(cond) if self.rescale else None
        cond -= uncond
        cond *= np.float32(self.scale)
        cond += uncond
        if wanted is None:
            return cond
        rescaled = cond * (wanted / _deviation(cond))
        return np.float32(self.rescale) * rescaled + np.float32(1 - self.rescale) * cond


def _deviation(prediction: Float32) -> Float32:
    """Standard deviation of each image: (B, 1, 1, 1) float32."""
    deviation: Float32 = prediction.std(axis=(1, 2, 3), ddof=1, keepdims=True)
    return deviation
