"""Process of the contestants "torch" and "torch.compile": the source folder through diffusers' pipeline, float32."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from deploy.bench.worker_messages import repeated, serve
from exporters.families import ComponentSpec, family_of
from exporters.families.open_source import open_source
from runtimes.bundle.roles import Role, Roles


def prepare() -> dict[str, Any]:
    """Load the pipeline of the command line: MODEL THREADS eager|compile. Compilation happens at the first call."""
    import torch
    from diffusers import DiffusionPipeline

    model, threads, kind = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    specs, roles = declared(model)
    part = specs[roles.denoiser.component].source_component
    if kind == "compile":
        setattr(pipeline, part, torch.compile(getattr(pipeline, part)))
    spent = dict.fromkeys(roles.generates_with, 0.0)
    for name in spent:
        owner = getattr(pipeline, specs[name].source_component)
        method = "decode" if roles.role(name) is Role.IMAGE_DECODER else "forward"
        setattr(owner, method, _timed(getattr(owner, method), name, spent))

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
        assert roles.role(name) is Role.DENOISER
        arrays = {key: torch.from_numpy(array) for key, array in dict(np.load(feeds)).items()}
        sample, context = arrays[roles.denoiser.sample], arrays[roles.conditioner.context]
        timestep = arrays[roles.denoiser.timestep][0].long()  # as the pipeline passes it
        network = getattr(pipeline, part)
        with torch.no_grad():  # the same guard as in the pipeline, or a compiled network would be compiled again
            return repeated(lambda: network(sample, timestep, encoder_hidden_states=context, return_dict=False), times)

    return {"generate": generate, "component": component}


def declared(model: str) -> tuple[dict[str, ComponentSpec], Roles]:
    """What the bundles of a model call its networks."""
    source = open_source(model)
    family = family_of(source.pipeline_class)
    return family.components(source, {}), family.roles(source)


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
