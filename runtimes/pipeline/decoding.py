"""Decodes the latents of finished jobs to images, several jobs in a call of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.backends.session import Session
from runtimes.bundle.roles import Codec
from runtimes.codec import autoencoder
from runtimes.codec.pixels import to_pil
from runtimes.pipeline.job import Job, images_at_once, sessions_of
from runtimes.pipeline.memory_budget import MemoryBudget

Pixels = NDArray[np.float32] | NDArray[np.uint8]


def decode_jobs(
    sessions: Mapping[str, Session], codec: Codec, jobs: Sequence[Job], memory: MemoryBudget | None,
    shares: Callable[[str], bool],
) -> list[Any]:
    """The results of jobs; one whose images cannot be decoded has an error and no image.

    Args:
        sessions: the networks.
        codec: names the decoder.
        jobs: all of them done.
        memory: how many images share a call; as many as the decoder takes if None.
        shares: whether images of several jobs may share a call of a component.

    Returns:
        for each job what its request wants: Pillow images, (B, H, W, 3) float32 in 0..1, or latents.
    """
    found: dict[int, Any] = {}
    groups: dict[Any, list[Job]] = {}
    for i, job in enumerate(jobs):
        if not job.live():
            found[id(job)] = []
        elif job.plan.request.output == "latents":
            found[id(job)] = np.array(job.latents)
        else:
            wanted = job.plan.wanted
            alone = wanted.tiling is not None or not shares(codec.decoder.component)
            groups.setdefault(i if alone else wanted.latent_shape, []).append(job)
    for group in groups.values():
        distinct = list(dict.fromkeys(group))
        decoded = _decoded_or_failed(sessions, codec, distinct, memory)
        found |= {id(job): _result(job, chunks) for job, chunks in zip(distinct, decoded, strict=True)}
    return [found[id(job)] for job in jobs]


def _decoded_or_failed(
    sessions: Mapping[str, Session], codec: Codec, jobs: list[Job], memory: MemoryBudget | None
) -> list[list[Pixels]]:
    """As `_decoded`. If that fails, each runs alone: what fails then is that job's own error."""
    try:
        return _decoded(sessions, codec, jobs, memory)
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].fail(error)
            return [[]]
        return [_decoded_or_failed(sessions, codec, [job], memory)[0] for job in jobs]


def _decoded(
    sessions: Mapping[str, Session], codec: Codec, jobs: list[Job], memory: MemoryBudget | None
) -> list[list[Pixels]]:
    """The images of jobs of one size, in chunks: (n, H, W, 3) each."""
    decoder, tiling = sessions_of(jobs, sessions)[codec.decoder.component], jobs[0].plan.wanted.tiling
    if tiling is not None:
        return [[_form(jobs[0], autoencoder.decode_tiled(decoder, jobs[0].latents, codec, tiling))]]
    latents = jobs[0].latents if len(jobs) == 1 else np.concatenate([job.latents for job in jobs])
    owners = [job for job in jobs for _ in job.plan.wanted.seeds]
    chunks: dict[int, list[Pixels]] = {id(job): [] for job in jobs}
    for part, sample in autoencoder.decoded(decoder, latents, codec, images_at_once(jobs, memory, len(owners), 1)):
        for job in dict.fromkeys(owners[part]):
            rows = [i for i, owner in enumerate(owners[part]) if owner is job]
            if job.live():
                try:
                    pixels = autoencoder.to_unit(sample[rows[0] : rows[-1] + 1], decoder.name)
                    chunks[id(job)].append(_form(job, pixels))
                except Exception as error:
                    job.fail(error)
    return [chunks[id(job)] for job in jobs]


def _form(job: Job, pixels: NDArray[np.float32]) -> Pixels:
    """Pixels (n, H, W, 3) in 0..1 as the request wants them: float32, or uint8 for Pillow."""
    return autoencoder.to_uint8(pixels) if job.plan.request.output == "pil" else pixels


def _result(job: Job, chunks: list[Pixels]) -> Any:
    if not job.live() or not chunks:
        return []
    whole: Any = np.concatenate(chunks)
    return to_pil(whole) if whole.dtype == np.uint8 else whole
