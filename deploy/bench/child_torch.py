"""Process of the contestants "torch" and "torch.compile": the source folder through diffusers' pipeline, float32."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from deploy.bench.messages import repeated, serve


def prepare() -> dict[str, Any]:
    """Load the pipeline of the command line: MODEL THREADS eager|compile. Compilation happens at the first call."""
    import torch
    from diffusers import DiffusionPipeline

    model, threads, kind = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if kind == "compile":
        pipeline.unet = torch.compile(pipeline.unet)
    spent = {"text_encoder": 0.0, "unet": 0.0, "vae_decoder": 0.0}
    for name, owner, attribute in (("text_encoder", pipeline.text_encoder, "forward"),
                                   ("unet", pipeline.unet, "forward"), ("vae_decoder", pipeline.vae, "decode")):
        setattr(owner, attribute, _timed(getattr(owner, attribute), name, spent))

    def generate(prompts: list[str], latents: str, steps: int, guidance: float, save: str) -> dict[str, Any]:
        noise = torch.from_numpy(np.load(latents))
        spent.update(dict.fromkeys(spent, 0.0))
        began = time.perf_counter()
        images = pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, latents=noise).images
        seconds = time.perf_counter() - began
        np.save(save, np.stack([np.asarray(image) for image in images]))
        return {"seconds": seconds, "profile": {"total": seconds, "python": seconds - sum(spent.values()),
                                                "components": dict(spent)}}

    def component(name: str, feeds: str, times: int) -> dict[str, Any]:
        assert name == "unet"
        arrays = {key: torch.from_numpy(array) for key, array in dict(np.load(feeds)).items()}
        arrays["timestep"] = arrays["timestep"][0].long()  # as the pipeline passes it
        with torch.no_grad():  # the same guard as in the pipeline, or a compiled network would be compiled again
            return repeated(lambda: pipeline.unet(
                arrays["sample"], arrays["timestep"], encoder_hidden_states=arrays["encoder_hidden_states"],
                return_dict=False), times)

    return {"generate": generate, "component": component}


def _timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - began

    return timed


if __name__ == "__main__":
    serve(prepare)
