"""Contestant "ours": a bundle through `runtimes`, without torch."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from tests.peers.protocol import repeated, serve

BUNDLE, THREADS = sys.argv[1], int(sys.argv[2])


def prepare() -> dict[str, Any]:
    """Load the bundle."""
    from runtimes import load
    from runtimes.profile import Profile

    pipeline = load(BUNDLE, threads=THREADS)

    def generate(prompt: str, latents: str, steps: int, guidance: float, save: str) -> dict[str, Any]:
        noise, profile = np.load(latents), Profile()
        began = time.perf_counter()
        images = pipeline(prompt, steps=steps, guidance_scale=guidance, latents=noise, profile=profile)
        seconds = time.perf_counter() - began
        np.save(save, np.asarray(images[0]))
        return {"seconds": seconds, "profile": {"total": profile.total_seconds, "python": profile.python_seconds,
                                                "components": dict(profile.seconds)}}

    def unet(feeds: str, times: int) -> dict[str, Any]:
        arrays = dict(np.load(feeds))
        session = pipeline.sessions["unet"]
        wanted = {s.name: arrays[s.name].astype(s.dtype) for s in session.component.inputs}
        return repeated(lambda: session.run(wanted), times)

    return {"generate": generate, "unet": unet}


if __name__ == "__main__":
    serve(prepare)
