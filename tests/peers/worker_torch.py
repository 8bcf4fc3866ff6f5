"""Contestants "diffusers eager" and "torch.compile(unet)": the source folder through diffusers, float32."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from tests.peers.protocol import repeated, serve

MODEL, THREADS, COMPILED = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "compile"


def prepare() -> dict[str, Any]:
    """Load the pipeline; compilation happens at the first call."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(THREADS)
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if COMPILED:
        pipeline.unet = torch.compile(pipeline.unet)

    def generate(prompt: str, latents: str, steps: int, guidance: float, save: str) -> dict[str, Any]:
        noise = torch.from_numpy(np.load(latents))
        began = time.perf_counter()
        images = pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, latents=noise).images
        seconds = time.perf_counter() - began
        np.save(save, np.asarray(images[0]))
        return {"seconds": seconds}

    def unet(feeds: str, times: int) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(array) for name, array in dict(np.load(feeds)).items()}
        arrays["timestep"] = arrays["timestep"][0].long()  # as the pipeline passes it
        with torch.no_grad():  # the same guard as in the pipeline, or a compiled network would be compiled again
            return repeated(lambda: pipeline.unet(
                arrays["sample"], arrays["timestep"], encoder_hidden_states=arrays["encoder_hidden_states"],
                return_dict=False), times)

    return {"generate": generate, "unet": unet}


if __name__ == "__main__":
    serve(prepare)
