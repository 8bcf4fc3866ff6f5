"""The loop over the steps of a run, with its hook and its two ways out: finished, or cancelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.batching import all_finite
from runtimes.backends.session import Arrays, Session, WrappedSession
from runtimes.errors import CancelledError, ParityError
from runtimes.pipeline.initial_latents import Start
from runtimes.pipeline.noise import NoiseStreams
from runtimes.schedulers import Run

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every denoising step.

    Attributes:
        index: 0 to total - 1.
        timestep: what the U-Net was told.
        latents: (B, C, H/f, W/f) float32 after the step, read-only.
        total: number of steps of this call.
        estimate: what the latents will be when all noise is gone, as far as they tell; `Pipeline.preview` shows it.
    """

    index: int
    timestep: float
    latents: Float32
    total: int
    estimate: Float32


OnStep = Callable[[Step], bool | None]


class Stop:
    """Where a call is asked whether it should end: before every step and every call of a network.

    Attributes:
        taken: denoising steps that are finished.
    """

    def __init__(self, cancel: Event | None, total: int) -> None:
        """End a call of `total` steps once `cancel` is set; never, without one."""
        self._cancel, self._total, self.taken = cancel, total, 0

    def check(self) -> None:
        """Go on, or raise CancelledError."""
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(self.taken, self._total)

    def watch(self, session: Session) -> Session:
        """`session`, asking before every call: a step of a large image has hundreds of them."""
        return session if self._cancel is None else _Stoppable(session, self)


class _Stoppable(WrappedSession):
    """Raises CancelledError before a call, once the run was ended."""

    def __init__(self, inner: Session, stop: Stop) -> None:
        super().__init__(inner)
        self._stop = stop

    def _run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        self._stop.check()
        return super()._run(feeds)


def denoise(
    predict: Callable[[Float32, float, int], Float32], run: Run, start: Start, noise: NoiseStreams, stop: Stop,
    on_step: OnStep | None = None, *, count: int | None = None,
) -> Float32:
    """Take the steps of a run.

    Args:
        predict: (sample as the U-Net wants it, timestep, step) -> prediction of the same shape.
        run: one run of a scheduler.
        start: the sample at the run's first noise level, (B, C, H/f, W/f) float32, and what of it is kept.
        noise: where steps that need fresh noise sample it.
        stop: may end the run before a step; told of each that is finished.
        on_step: called after every step; False ends the run, as does what it raises.
        count: how many steps, where the rest is another model's; every one by default.

    Returns:
        the denoised latents, same shape.

    Raises:
        CancelledError: the run was ended.
        ParityError: the latents are not finite any more.
    """
    sample, timesteps = start.sample, [float(t) for t in run.timesteps][:count]
    for i, timestep in enumerate(timesteps):
        stop.check()
        prediction = predict(run.scale_model_input(sample, i), timestep, i)
        fresh = noise.sample(sample.shape[1:]) if run.needs_noise(i) else None
        sample = run.step(prediction, i, sample, fresh)
        if start.kept is not None:
            sample = start.kept.put_back(sample, run, i)
        if not all_finite(sample):
            raise ParityError(f"the latents are not finite after step {i + 1} of {len(timesteps)}", where="unet",
                              fix="build the U-Net in a higher precision")
        stop.taken = i + 1
        if on_step is not None and on_step(_told(run, i, timestep, sample, len(timesteps))) is False:
            raise CancelledError(i + 1, len(timesteps))
    return sample


def _told(run: Run, i: int, timestep: float, sample: Float32, total: int) -> Step:
    latents, estimate = sample.view(), run.estimate(sample, i + 1).view()
    for array in (latents, estimate):
        array.setflags(write=False)
    return Step(i, timestep, latents, total, estimate)
