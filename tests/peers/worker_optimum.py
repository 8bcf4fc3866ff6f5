"""Contestant "optimum-onnx": ORTStableDiffusionPipeline on optimum's own export. Runs in its own environment."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploy.bench.worker_messages import arguments, serve

MODEL, _THREADS, _EXPORTED = arguments(__doc__, "MODEL", "THREADS", "EXPORTED")
THREADS, EXPORTED = int(_THREADS), Path(_EXPORTED)


def prepare() -> dict[str, Any]:
    """Export unless that is done, then load."""
    import onnxruntime as ort
    import torch
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    torch.set_num_threads(THREADS)
    if not (EXPORTED / "model_index.json").is_file():
        partial = EXPORTED.with_name(EXPORTED.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        main_export(MODEL, output=partial, task="text-to-image", library_name="diffusers", do_validation=False)
        partial.rename(EXPORTED)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    pipeline = ORTStableDiffusionPipeline.from_pretrained(EXPORTED, session_options=options)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], latents: str, steps: int, guidance: float, save: str) -> dict[str, Any]:
        noise = torch.from_numpy(np.load(latents))
        began = time.perf_counter()
        images = pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, latents=noise).images
        seconds = time.perf_counter() - began
        np.save(save, np.stack([np.asarray(image) for image in images]))
        return {"seconds": seconds}

    return {"generate": generate}


if __name__ == "__main__":
    serve(prepare)
