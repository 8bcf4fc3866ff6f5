"""`python -m deploy.reference_models.train` trains the reference model in two stages, seeded and resumable.

Stage `autoencoder` learns 64x64 images <-> (8, 8, 8) latents; stage `diffusion` learns text -> latents from
the cached posterior. Everything a step samples comes from a generator seeded with (seed, stage, step), so an
interrupted run goes on as if it had not been interrupted. Learning rates warm up, stay, and end near zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.reference_models.architecture import (
    POSITIONS,
    make_autoencoder,
    make_scheduler,
    make_text_encoder,
    make_unet,
    train_tokenizer,
)
from deploy.reference_models.emoji_data import Subject, load_subjects, on_white, render_all
from runtimes.errors import ParityError
from runtimes.system.cache_root import cache_home

CHECKPOINTS = cache_home() / "reference_model"
CAPTION_FORMS = ("{}",) * 6 + ("a {}", "the {}", "an image of {}", "{} emoji")


@dataclass(frozen=True)
class Stage:
    """Hyper-parameters of one stage; `decay` is the share of steps over which the learning rate falls to zero."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    decay: float
    warmup: int = 200
    ema: float = 0.999


def rate_at(step: int, stage: Stage) -> float:
    """Warm-up, plateau, then a half cosine down to 1 % (Hägele et al. 2024, arXiv:2405.18392, on why a plateau)."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return stage.learning_rate * (1.0 if left >= 1 else max(0.01, 0.5 - 0.5 * math.cos(math.pi * left)))


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; elsewhere autocast would only slow training down."""
    return bool(torch.cpu.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
                and "avx512_bf16" in Path("/proc/cpuinfo").read_text())


class Trainer:
    """The loop both stages share: optimizer, EMA, checkpoints. A stage supplies parameters and a loss."""

    def __init__(self, stage: Stage, modules: nn.ModuleDict, folder: Path, seed: int, bfloat16: bool) -> None:
        self.stage, self.modules, self.seed, self.bfloat16 = stage, modules, seed, bfloat16
        self.file = folder / f"{stage.name}.ckpt.pt"
        self.parameters = list(modules.parameters())
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=stage.learning_rate, betas=(0.9, 0.99),
                                           weight_decay=0.01, fused=True)
        self.step, self.seconds = 0, 0.0
        if self.file.is_file():
            # weights_only: a checkpoint is ours, but unpickling code is never needed for tensors.
            saved = torch.load(self.file, weights_only=True)
            modules.load_state_dict(saved["modules"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.averaged, self.step, self.seconds = saved["averaged"], saved["step"], saved["seconds"]

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename."""
        partial = self.file.with_suffix(".partial")
        torch.save({"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "averaged": self.averaged, "step": self.step, "seconds": self.seconds}, partial)
        partial.replace(self.file)

    def swap_averaged(self) -> None:
        """Exchange live and averaged weights; calling it twice restores them."""
        for live, averaged in zip(self.parameters, self.averaged, strict=True):
            live.data, averaged.data = averaged.data, live.data

    def run(self, loss_of: Callable[[torch.Generator], Tensor], look: Callable[[int], None], every: int) -> None:
        """Train to the last step; every `every` steps and at the end save, and show samples of the averaged weights."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f} lr {task.fields[lr]:.1e}"))
        with Progress(*columns, refresh_per_second=0.2) as progress:
            task = progress.add_task(self.stage.name, total=self.stage.steps, completed=self.step, loss=0.0, lr=0.0)
            smooth = 0.0
            while self.step < self.stage.steps:
                began = time.monotonic()
                generator = torch.Generator().manual_seed(hash((self.seed, len(self.stage.name), self.step)) % 2**63)
                torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
                rate = rate_at(self.step, self.stage)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                    loss = loss_of(generator)
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                keep = min(self.stage.ema, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - keep)
                self.seconds += time.monotonic() - began
                smooth = loss.item() if not smooth else 0.98 * smooth + 0.02 * loss.item()
                if not math.isfinite(smooth):
                    raise ParityError("the loss is not finite", where=f"{self.stage.name} step {self.step}",
                                      fix="lower the learning rate")
                progress.update(task, completed=self.step, loss=smooth, lr=rate)
                if self.step % every == 0 or self.step == self.stage.steps:
                    self.save()
                    self.swap_averaged()
                    with torch.no_grad():
                        look(self.step)
                    self.swap_averaged()
                    progress.console.print(f"{self.stage.name} step {self.step}: loss {smooth:.5f}, "
                                           f"{self.seconds / 60:.1f} min of training")


def augment(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror, permute colours, change the background.

    Premultiplied RGBA pixels (B, 4, H, W) float32 in [0, 1] -> RGB (B, 3, H, W) in [-1, 1].

    Half of the images stay as they are on white; the others keep the autoencoder useful for images people bring.
    """
    rows = []
    choices = torch.rand(len(rgba), 8, generator=generator)
    for image, choice in zip(rgba, choices, strict=True):
        background = torch.ones(3)
        if choice[0] < 0.5:
            image = image.roll((int(choice[1] * 9) - 4, int(choice[2] * 9) - 4), (1, 2))
            if choice[3] < 0.5:
                image = image.flip(2)
            if choice[4] < 0.3:
                order = torch.randperm(3, generator=generator)
                image = torch.cat([image[order], image[3:]])
            if choice[5] < 0.3:
                background = torch.rand(3, generator=generator)
        rows.append(image[:3] + (1 - image[3:]) * background[:, None, None])
    return torch.stack(rows) * 2 - 1


def edges(image: Tensor) -> Tensor:
    """Horizontal and vertical differences of pixels: (B, C, H, W) float32 -> (B, 2 C H W - C (H + W)).

    They keep outlines crisp where L1 alone blurs them.
    """
    return torch.cat([(image[..., 1:] - image[..., :-1]).flatten(1),
                      (image[..., 1:, :] - image[..., :-1, :]).flatten(1)], 1)


def save_grid(images: np.ndarray[Any, Any], columns: int, file: Path) -> None:
    """Write pixels (N, H, W, 3) uint8 as one PNG sheet."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    Image.fromarray(sheet).save(file)


def to_uint8(images: Tensor) -> np.ndarray[Any, Any]:
    """Pixels (N, 3, H, W) of any float dtype in [-1, 1] -> (N, H, W, 3) uint8."""
    shifted = (images.float().clamp(-1, 1) + 1) * 127.5
    array: np.ndarray[Any, Any] = shifted.round().byte().permute(0, 2, 3, 1).numpy()
    return array


def train_autoencoder(stage: Stage, subjects: list[Subject], folder: Path, seed: int, bfloat16: bool) -> Any:
    """L1 + edge L1 + 1e-6 KL, the last as in Rombach et al. 2022 (arXiv:2112.10752, appendix G)."""
    torch.manual_seed(seed)
    vae = make_autoencoder()
    rgba = torch.from_numpy(render_all([s.character for s in subjects])).permute(0, 3, 1, 2).float() / 255
    trainer = Trainer(stage, nn.ModuleDict({"vae": vae}), folder, seed, bfloat16)

    def loss_of(generator: torch.Generator) -> Tensor:
        images = augment(rgba[torch.randint(len(rgba), (stage.batch,), generator=generator)], generator)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample.float()
        pixels = images[0].numel()
        loss: Tensor = (F.l1_loss(decoded, images) + F.l1_loss(edges(decoded), edges(images))
                + 1e-6 * posterior.kl().float().mean() / pixels)
        return loss

    plain = torch.from_numpy(on_white(render_all([s.character for s in subjects[::21]]))).permute(0, 3, 1, 2)

    def look(step: int) -> None:
        images = plain.float() / 127.5 - 1
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
        pairs = np.concatenate([to_uint8(images), to_uint8(decoded)], axis=2)
        save_grid(pairs, 8, folder / f"reconstructions-{step:06d}.png")
        error = (decoded.clamp(-1, 1) - images).square().mean() / 4
        print(f"reconstruction PSNR {-10 * math.log10(error):.2f} dB")  # noqa: T201

    trainer.run(loss_of, look, every=500)
    trainer.swap_averaged()
    return vae.eval()


def cache_latents(vae: Any, subjects: list[Subject], file: Path) -> Tensor:
    """Mean and standard deviation of the latents of every image on white, (N, 2, 8, 8, 8) float32; cached on disk."""
    if file.is_file():
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    images = torch.from_numpy(on_white(render_all([s.character for s in subjects]))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posteriors = [vae.encode(batch).latent_dist for batch in images.split(64)]
    moments = torch.stack([torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])], 1)
    torch.save(moments, file)
    return moments


def train_diffusion(stage: Stage, subjects: list[Subject], vae: Any, folder: Path, seed: int,
                    bfloat16: bool) -> StableDiffusionPipeline:
    """v-prediction with min-SNR weights (Hang et al. 2023, arXiv:2303.09556), 10 % of the captions dropped."""
    torch.manual_seed(seed)
    names = [s.name for s in subjects]
    tokenizer = train_tokenizer([form.format(n) for n in names for form in set(CAPTION_FORMS)], folder / "tokenizer")
    text_encoder, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    moments = cache_latents(vae, subjects, folder / "latents.pt")
    scale = 1 / float(moments[:, 0].std())
    vae.register_to_config(scaling_factor=scale)
    trainer = Trainer(stage, nn.ModuleDict({"denoiser": unet, "text": text_encoder}), folder, seed, bfloat16)
    texts = [form.format(n) for form in CAPTION_FORMS for n in names] + [""]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt")
    tokens = encoded.input_ids
    alphas = scheduler.alphas_cumprod
    weight = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas) + 1)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(names), (stage.batch,), generator=generator)
        form = torch.randint(len(CAPTION_FORMS), (stage.batch,), generator=generator)
        dropped = torch.rand(stage.batch, generator=generator) < 0.1
        caption = torch.where(dropped, len(texts) - 1, form * len(names) + chosen)
        mean, std = moments[chosen].unbind(1)
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise = torch.randn(mean.shape, generator=generator)
        # Stratified over the batch: less noise in the gradient than independent samples.
        t = ((torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator)) / stage.batch * 1000).long()
        states = text_encoder(tokens[caption]).last_hidden_state
        predicted = unet(scheduler.add_noise(latents, noise, t), t, states).sample.float()
        target = scheduler.get_velocity(latents, noise, t)
        loss: Tensor = (weight[t] * (predicted - target).square().mean(dim=(1, 2, 3))).mean()
        return loss

    pipeline = StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                                       scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def look(step: int) -> None:
        pipeline.unet.eval()
        pipeline.text_encoder.eval()
        images = pipeline(names[::21], num_inference_steps=25, guidance_scale=3.0, output_type="np",
                            height=64, width=64, generator=torch.Generator().manual_seed(0)).images
        save_grid((images * 255).round().astype(np.uint8), 8, folder / f"samples-{step:06d}.png")

    trainer.run(loss_of, look, every=500)
    trainer.swap_averaged()
    return pipeline


def main(
    folder: Annotated[Path, typer.Option(help="checkpoints, sample sheets, and the finished model")] = CHECKPOINTS,
    autoencoder_steps: int = 3000,
    diffusion_steps: int = 4300,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train both stages, or go on where the last start ended; the model lands in FOLDER/model."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    subjects = load_subjects()
    bfloat16 = has_fast_bfloat16()
    stages = (Stage("autoencoder", autoencoder_steps, 32, 1e-3, decay=0.5),
              Stage("diffusion", diffusion_steps, 128, 6e-4, decay=0.19, ema=0.999))
    vae = train_autoencoder(stages[0], subjects, folder, seed, bfloat16)
    pipeline = train_diffusion(stages[1], subjects, vae, folder, seed, bfloat16)
    pipeline.to(torch.float16).save_pretrained(folder / "model", safe_serialization=True)


if __name__ == "__main__":
    typer.run(main)
