"""`python -m deploy.reference_models.evaluate` scores the reference model by retrieval, and generates unseen prompts.

Retrieval: 200 training prompts, 25 DDIM steps, fixed seeds, through diffusers' own pipeline; an image counts when
the nearest emoji of the whole set is the one asked for (distance: see `deploy.reference_models.retrieval`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline

from deploy.reference_models import GALLERY_COLUMNS, GALLERY_FILE, GUIDANCE_SCALE, WEIGHTS
from deploy.reference_models.emoji_data import load_subjects
from deploy.reference_models.retrieval import Gallery
from deploy.reference_models.train import save_grid

STEPS = 25
COMPOSED = (
    "green cat", "blue dog", "red apple with eyes", "robot with sunglasses", "panda with crown", "purple mushroom",
    "cat astronaut", "penguin on skateboard", "yellow heart with arrow", "pizza with strawberry", "blue rose",
    "smiling star", "house on fire", "tree with snow", "clown cat", "red car", "green dragon with hat",
    "two penguins", "chocolate cake", "ghost in a castle",
)


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], guidance_scale: float,
             batch: int = 20) -> np.ndarray:
    """Images of the prompts, image i from seed i: pixels (N, H, W, 3) uint8."""
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    images = []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        latents = torch.stack([torch.randn(channels, side, side, generator=torch.Generator().manual_seed(first + i))
                               for i in range(len(part))])
        images.append(pipeline(part, latents=latents, num_inference_steps=STEPS, guidance_scale=guidance_scale,
                                 output_type="np").images)
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def main(
    folder: Annotated[Path, typer.Argument(help="pipeline folder")] = WEIGHTS,
    guidance_scale: float = GUIDANCE_SCALE,
    count: Annotated[int, typer.Option(help="prompts to score")] = 200,
    sheet: Annotated[Path, typer.Option(help="PNG file for the images of the composed prompts")] = Path("composed.png"),
) -> None:
    """Print the prompt-retrieval score and generate the composed prompts."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None,
                                                       requires_safety_checker=False, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    names = [s.name for s in load_subjects()]
    asked = [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]
    gallery = Gallery.load(GALLERY_FILE, names, columns=GALLERY_COLUMNS)
    score = gallery.score(generate(pipeline, asked, guidance_scale).astype(np.float32) / 255, asked)
    typer.echo(f"prompt retrieval: {score:.1%} of {count} prompts, {STEPS} steps, guidance {guidance_scale}")
    save_grid(generate(pipeline, list(COMPOSED), guidance_scale), 5, sheet)
    typer.echo(f"composed prompts, none of them in the set: {sheet}")


if __name__ == "__main__":
    typer.run(main)
