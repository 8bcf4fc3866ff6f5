"""Ray Serve's own text-to-image tutorial (docs.ray.io, "Serve a Stable Diffusion Model"), on another model.

    python -m tests.peers.serving.tutorial_ray MODEL PORT THREADS

Changed: the model's folder, float32 and cores in place of stable-diffusion-xl, float16 and a GPU; one replica that is
there from the start, in place of autoscaling from none; steps and seed can be asked for.
"""

from __future__ import annotations

import signal
import sys
import threading
from io import BytesIO
from typing import Any

import ray
import torch
from fastapi import FastAPI
from fastapi.responses import Response
from ray import serve
from ray.serve.handle import DeploymentHandle

app = FastAPI()


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class APIIngress:
    """The tutorial's front."""

    def __init__(self, diffusion_model_handle: DeploymentHandle) -> None:
        self.handle = diffusion_model_handle

    @app.get("/health/ready")
    async def ready(self) -> dict[str, str]:
        """Added: whether it answers."""
        return {"status": "ok"}

    @app.get("/imagine", responses={200: {"content": {"image/png": {}}}}, response_class=Response)
    async def generate(self, prompt: str, steps: int = 25, seed: int = 0) -> Response:
        """One image as a file."""
        image = await self.handle.generate.remote(prompt, steps, seed)
        file_stream = BytesIO()
        image.save(file_stream, "PNG")
        return Response(content=file_stream.getvalue(), media_type="image/png")


@serve.deployment
class StableDiffusion:
    """The tutorial's model: one request at a time, since `generate` is a plain method."""

    def __init__(self, model: str, threads: int) -> None:
        from diffusers import DiffusionPipeline

        torch.set_num_threads(threads)
        self.pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.lock = threading.Lock()  # Ray runs plain methods in a pool of threads; the tutorial relies on one

    def generate(self, prompt: str, steps: int, seed: int) -> Any:
        """One image."""
        with self.lock:
            generator = torch.Generator("cpu").manual_seed(seed)
            return self.pipe(prompt, num_inference_steps=steps, generator=generator).images[0]


def main(model: str, port: int, threads: int) -> None:
    """Serve until SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ray.init(num_cpus=threads, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    model_deployment = StableDiffusion.options(ray_actor_options={"num_cpus": threads}).bind(model, threads)
    serve.run(APIIngress.bind(model_deployment))
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
