"""Classifier-free guidance: Ho & Salimans, arXiv 2207.12598. Both predictions of the U-Net in one batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtimes.batching import RowRunner, row_range, slices
from runtimes.session import Session

Float32 = NDArray[np.float32]


def combine(uncond: Float32, cond: Float32, scale: float) -> Float32:
    """The guided prediction, eq. 6 with w = scale - 1 as diffusers counts it: (B, C, H/f, W/f) float32 each.

    `cond` is overwritten with the result: it is the network's output, which nobody else holds.
    """
    cond -= uncond
    cond *= np.float32(scale)
    cond += uncond
    return cond


class GuidedUnet:
    """The U-Net under one set of prompts and one guidance scale, for as many images as a call has.

    More images than the U-Net's batch axis allows are cut into several calls, each holding both halves of its images.
    """

    def __init__(self, unet: Session, cond: Float32, uncond: Float32 | None, scale: float) -> None:
        """Lay out the batches.

        Args:
            unet: sample, timestep, encoder_hidden_states -> out_sample.
            cond: (B, tokens, width), embedded prompts.
            uncond: the same for the negative prompts; None turns guidance off and halves the work.
            scale: guidance scale.
        """
        self._scale, self._guided = scale, uncond is not None
        most = row_range(unet).max
        self._parts = slices(len(cond), max(most // 2, 1) if self._guided else most)
        hidden = [cond[p] if uncond is None else np.concatenate([uncond[p], cond[p]]) for p in self._parts]
        self._runners = [RowRunner(unet, len(rows)) for rows in hidden]
        self._hidden = [runner.cast("encoder_hidden_states", rows)
                        for runner, rows in zip(self._runners, hidden, strict=True)]

    def __call__(self, sample: Float32, timestep: float) -> Float32:
        """Predict: (B, C, H/f, W/f) float32 in, the same out."""
        parts = [self._predict(sample[part], timestep, runner, hidden)
                 for part, runner, hidden in zip(self._parts, self._runners, self._hidden, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _predict(self, sample: Float32, timestep: float, runner: RowRunner, hidden: NDArray[np.generic]) -> Float32:
        if self._guided:
            sample = np.concatenate([sample, sample])
        feeds = {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32),
                 "encoder_hidden_states": hidden}
        output: Float32 = runner.run(feeds, "out_sample")
        if output.dtype != np.float32:
            output = output.astype(np.float32)
        if not self._guided:
            return output
        half = len(output) // 2
        return combine(output[:half], output[half:], self._scale)
