"""Process of the contestant "a bundle": generates through `runtimes`, without torch."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from deploy.bench.worker_messages import repeated, serve


def prepare() -> dict[str, Any]:
    """Load the bundle of the command line: BUNDLE THREADS DEVICE."""
    from runtimes import load
    from runtimes.backends.time_profile import Profile

    bundle, threads, device = sys.argv[1:4]
    pipeline = load(bundle, device, int(threads))

    def generate(prompts: list[str], latents: str, steps: int, guidance: float, save: str) -> dict[str, Any]:
        noise, profile = np.load(latents), Profile()
        began = time.perf_counter()
        images = pipeline(prompts, steps=steps, guidance_scale=guidance, latents=noise, profile=profile)
        seconds = time.perf_counter() - began
        np.save(save, np.stack([np.asarray(image) for image in images]))
        return {"seconds": seconds, "profile": {"total": profile.total_seconds, "python": profile.python_seconds,
                                                "components": dict(profile.seconds), "calls": dict(profile.calls)}}

    def component(name: str, feeds: str, times: int) -> dict[str, Any]:
        session, arrays = pipeline.sessions[name], dict(np.load(feeds))
        wanted = {s.name: arrays[s.name].astype(s.dtype) for s in session.component.inputs}
        return repeated(lambda: session.run(wanted), times)

    return {"generate": generate, "component": component}


if __name__ == "__main__":
    serve(prepare)
