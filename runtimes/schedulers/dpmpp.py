"""DPM-Solver++: Lu et al., Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv 2211.01095.

The multistep method in data prediction, order 1 to 3 (2M is the paper's Algorithm 2), as an ODE or as an SDE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from runtimes.errors import InputError
from runtimes.schedulers.multistep import MultistepRun, MultistepSettings
from runtimes.schedulers.settings import WHERE, required
from runtimes.schedulers.sigmas import Float32


@dataclass(frozen=True, kw_only=True)
class DpmSolverPP(MultistepSettings):
    """DPM-Solver++ with the keys and defaults of diffusers' DPMSolverMultistepScheduler."""

    unsupported: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "thresholding": False,
            "use_beta_sigmas": False,
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
            "variance_type": None,
        }
    )
    # deis is read as dpmsolver++, as diffusers does; the older dpmsolver in noise prediction is not implemented.
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {**MultistepSettings.choices, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis")}
    )

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf

    def __post_init__(self) -> None:
        """Refuse what the method does not do."""
        super().__post_init__()
        if self.stochastic and self.solver_order > 2:
            # diffusers' third-order SDE update has a sign error: its last coefficient tends to -1, not 0, with h.
            raise InputError("sde-dpmsolver++ is implemented to order 2", where=WHERE, fix="set solver_order to 2")

    def start(self, steps: int, strength: float = 1.0, eta: float = 0.0) -> DpmSolverPPRun:
        """Begin a run; see `protocol.Scheduler.start`."""
        return DpmSolverPPRun(self, steps, self.check_start(steps, strength, eta))

    @property
    def stochastic(self) -> bool:
        """Whether the SDE is solved, with fresh noise at each step."""
        return self.algorithm_type == "sde-dpmsolver++"

    @property
    def last_timestep(self) -> int:
        """Training timesteps with lambda below lambda_min_clipped are left out: the cosine schedule needs it."""
        lambdas = -np.log(self.training_sigmas[::-1])
        return self.num_train_timesteps - int(np.searchsorted(lambdas, self.lambda_min_clipped))

    @property
    def rounds_karras(self) -> bool:
        """As diffusers, the cosine schedule excepted."""
        return self.use_karras_sigmas and self.beta_schedule != "squaredcos_cap_v2"


class DpmSolverPPRun(MultistepRun):
    """One run of DPM-Solver++."""

    def __init__(self, scheduler: DpmSolverPP, steps: int, first: int) -> None:
        """Leave out the `first` of `steps` steps."""
        super().__init__(scheduler, steps, first)
        self._scheduler = scheduler

    def needs_noise(self, i: int) -> bool:
        """Every step of the SDE but one to the clean sample."""
        return self._scheduler.stochastic and self._sigmas[i + 1] > 0

    def step(self, model_output: Float32, i: int, sample: Float32, noise: Float32 | None = None) -> Float32:
        """One step from lambda_i to lambda_{i+1}: eq. 8 of the paper with k = order; the SDE doubles h."""
        self._in_order(i)
        self._remember(self._original(model_output, i, sample))
        h = self._lambdas[i + 1] - self._lambdas[i]
        if h == 0:
            return sample
        span = 2 * h if self._scheduler.stochastic else h
        alpha, phi = self._alphas[i + 1], math.expm1(-span)
        kept = math.exp(-h) if self._scheduler.stochastic else 1.0
        ratio = alpha * self._sigmas[i + 1] / (self._alphas[i] * self._sigmas[i])
        previous: Float32 = kept * ratio * sample - alpha * phi * self._originals[-1]
        for weight, derivative in zip(self._weights(i, span, phi), self._derivatives(i, h), strict=True):
            previous = previous + alpha * weight * derivative
        if not self.needs_noise(i):
            return previous
        return previous + alpha * self._sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h)) * required(noise)

    def _order(self, i: int) -> int:
        """Lower at the start for want of a memory, and at the end for stability in few steps."""
        config, left = self._scheduler, self._total - self._first - i
        few = config.lower_order_final and self._total < 15
        if left == 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        return min(config.solver_order, i + 1, left if few else config.solver_order)

    def _derivatives(self, i: int, h: float) -> list[Float32]:
        """Finite differences of x_0 in lambda, times h and h^2: as many as the order, less one."""
        order = self._order(i)
        if order == 1:
            return []
        newest = self._originals[::-1]
        h_0 = self._lambdas[i] - self._lambdas[i - 1]
        near: Float32 = (h / h_0) * (newest[0] - newest[1])
        if order == 2:
            return [near]
        h_1 = self._lambdas[i - 1] - self._lambdas[i - 2]
        bend: Float32 = near - (h / h_1) * (newest[1] - newest[2])
        return [near + (h_0 / (h_0 + h_1)) * bend, (h / (h_0 + h_1)) * bend]

    def _weights(self, i: int, span: float, phi: float) -> list[float]:
        order = self._order(i)
        if order == 1:
            return []
        if order == 2 and self._scheduler.solver_type != "heun":
            return [-0.5 * phi]
        return [phi / span + 1, -((phi + span) / span**2 - 0.5)][: order - 1]
