"""Trajectory and image level: latents after every step and pictures at the end, of two pipelines side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.parity.metrics import psnr_db, relative_l2, ssim
from deploy.parity.reference.trajectories import Drawing, DrawRequest
from runtimes.codec.autoencoder import to_uint8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pair:
    """One prompt drawn by both, as a report shows it.

    Attributes:
        reference, candidate: (H, W, 3) uint8.
        psnr_db, ssim: of the pictures before they were rounded to 8 bits.
    """

    prompt: str
    scheduler: str
    reference: Array
    candidate: Array
    psnr_db: float
    ssim: float


def latent_errors(reference: Drawing, candidate: Drawing) -> Array:
    """relative L2 of every picture's latents after every step: (steps, B) float64."""
    steps, images = reference.latents.shape[:2]
    errors = [[relative_l2(reference.latents[s, i], candidate.latents[s, i]) for i in range(images)]
              for s in range(steps)]
    return np.array(errors, np.float64)


def pairs(request: DrawRequest, reference: Drawing, candidate: Drawing) -> list[Pair]:
    """Both pictures of every prompt with their PSNR and SSIM."""
    return [
        Pair(prompt, request.scheduler, _shown(r), _shown(c), psnr_db(r, c), ssim(r, c))
        for prompt, r, c in zip(request.prompts, reference.images, candidate.images, strict=True)
    ]


def _shown(image: Array) -> Array:
    shown: Array = to_uint8(np.nan_to_num(image))
    return shown
