"""Linear multistep: Adams-Bashforth in sigma with uneven steps, order 4; k-diffusion's `sample_lms`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runtimes.schedulers import noise_levels
from runtimes.schedulers.noise_levels import Float32
from runtimes.schedulers.settings import SpreadSettings
from runtimes.schedulers.variance_exploding import ExplodingRun, linear_schedule

ORDER = 4
# The positive nodes of the 21-point Gauss-Kronrod rule on [-1, 1] and 0, with their weights: QUADPACK, qk21.
NODES = np.array([
    0.995657163025808080735527280689003, 0.973906528517171720077964012084452, 0.930157491355708226001207180059508,
    0.865063366688984510732096688423493, 0.780817726586416897063717578345042, 0.679409568299024406234327365114874,
    0.562757134668604683339000099272694, 0.433395394129247190799265943165784, 0.294392862701460198131126602103866,
    0.148874338981631210884826001129720, 0.0,
])
NODE_WEIGHTS = np.array([
    0.011694638867371874278064396062192, 0.032558162307964727478818972459390, 0.054755896574351996031381300244580,
    0.075039674810919952767043140916190, 0.093125454583697605535065465083366, 0.109387158802297641899210590325805,
    0.123491976262065851077958109585166, 0.134709217311473325928054001771707, 0.142775938577060080797094273138717,
    0.147739104901338491374841515972068, 0.149445554002916905664936468389821,
])


@dataclass(frozen=True, kw_only=True)
class Lms(SpreadSettings):
    """The method with the keys and defaults of diffusers' LMSDiscreteScheduler."""

    foreign: ClassVar[frozenset[str]] = frozenset({"rescale_betas_zero_snr"})
    karras_limits: ClassVar[bool] = False

    def _run(self, steps: int, first: int, eta: float) -> LmsRun:
        timesteps, levels = linear_schedule(self, steps)
        if self.spreads:
            levels = self.spread(levels, steps)
            timesteps = noise_levels.timesteps_of(levels, self.training_sigmas).astype(np.float32)
        return LmsRun(self, timesteps, np.append(levels, 0.0).astype(np.float32), first)


class LmsRun(ExplodingRun):
    """One run of the linear multistep method."""

    def __init__(self, settings: Lms, timesteps: Float32, levels: Float32, first: int) -> None:
        """Leave out the `first` of `timesteps`."""
        super().__init__(settings, timesteps, levels, first)
        self._weights = [_weights(levels, first + i) for i in range(len(self.timesteps))]
        self._slopes: list[Float32] = []  # newest first, four at most

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """x plus the integral of the polynomial through the last slopes."""
        self._in_order(i)
        self._slopes = [self._slope(model_output, i, sample), *self._slopes[: ORDER - 1]]
        # Image to image has fewer slopes at first than weights: diffusers then leaves out the oldest ones' share.
        weighted = [weight * slope for weight, slope in zip(self._weights[i], self._slopes, strict=False)]
        return sample + np.sum(weighted, axis=0, dtype=np.float32)


def _weights(levels: Float32, i: int) -> list[float]:
    """Integrals from level i to level i + 1 of the Lagrange polynomials over the levels i, i - 1, ..., four at most.

    By QUADPACK's 21-point Gauss-Kronrod rule, the polynomials in float32, as diffusers calls scipy.integrate.quad: the
    method can amplify differences in the last bit a thousandfold.
    """
    known = levels[max(i - ORDER + 1, 0) : i + 1][::-1]
    center, half = (float(levels[i]) + float(levels[i + 1])) / 2, (float(levels[i + 1]) - float(levels[i])) / 2
    places = (center + half * np.concatenate([-NODES[:-1], NODES[::-1]])).astype(np.float32)
    rule = np.concatenate([NODE_WEIGHTS[:-1], NODE_WEIGHTS[::-1]])
    weights = []
    for k, level in enumerate(known):
        polynomial = np.ones_like(places)
        for other in np.delete(known, k):
            polynomial = polynomial * ((places - other) / (level - other))
        weights.append(float(half * np.sum(rule * polynomial)))
    return weights
