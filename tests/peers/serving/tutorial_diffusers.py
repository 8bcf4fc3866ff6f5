"""The usual tutorial: FastAPI in front of diffusers' pipeline, with a lock, since a pipeline is not safe to share.

    python -m tests.peers.serving.tutorial_diffusers MODEL PORT THREADS

The route and its answer are those of diffusers' own examples/server, with the image in the answer as ours has it.
"""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    """What the load asks; further fields are without effect."""

    prompt: str
    num_inference_steps: int = 25
    seed: int = 0


def application(model: str, threads: int) -> FastAPI:
    """The server of one model folder, float32."""
    torch.set_num_threads(threads)
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    lock, app = threading.Lock(), FastAPI()

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:  # not async: FastAPI runs it in a thread of its pool
        with lock:
            generator = torch.Generator("cpu").manual_seed(body.seed)
            image = pipeline(body.prompt, num_inference_steps=body.num_inference_steps, generator=generator).images[0]
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return {"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1], int(sys.argv[3])), host="127.0.0.1", port=int(sys.argv[2]),
                log_level="warning")
