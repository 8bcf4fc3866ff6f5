"""The four checks of `diagnose`: autoencoder, U-Net, text, guidance. `deploy.diagnose.probe` asks the networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.diagnose.probe import Probe
from deploy.parity.metrics import psnr_db, relative_l2
from runtimes.errors import ParityError

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """The limits that a sound model stays within: rules of thumb with room to spare, not an accuracy budget.

    Attributes:
        latent_std: least and greatest deviation of scaled latents; a scaling factor makes them 1 on its data set.
        reconstruction_psnr_db: least, of images encoded and decoded.
        noise_error: greatest mean squared error of predicted noise, relative to the best linear guess.
        sample_std: least and greatest deviation of denoised latents.
        text_response: least relative L2 between predictions under a prompt and under none.
        prompts_found: least share of images whose noise the prompt they were generated from explains best.
        clipped: greatest share of pixel values at black or white beyond what images without guidance have.
    """

    latent_std: tuple[float, float] = (0.75, 1.33)
    reconstruction_psnr_db: float = 20.0
    noise_error: float = 0.95
    sample_std: tuple[float, float] = (0.5, 1.6)
    text_response: float = 0.01
    prompts_found: float = 0.5
    clipped: float = 0.3


LIMITS = Limits()


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: vae, unconditional, text or guidance.
        ok: whether it found nothing wrong.
        verdict: what it found.
        advice: what to do; empty if nothing.
        figures: what the verdict rests on, JSON-able.
    """

    name: str
    ok: bool
    verdict: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """The four checks in order."""

    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        return {"ok": all(c.ok for c in self.checks), "checks": [asdict(c) for c in self.checks]}

    def enforce(self) -> None:
        """Let what was found reach the exit code.

        Raises:
            ParityError: naming the first check that found something: those after it rest on it.
        """
        for check in self.checks:
            if not check.ok:
                raise ParityError(check.verdict, where=f"check {check.name}", fix=check.advice)


@dataclass(frozen=True)
class Samples:
    """The pipeline's images of some prompts from the same noise, (B, C, H/f, W/f) and (B, H, W, 3) float32.

    Attributes:
        latents, pixels: under guidance.
        plain, plain_pixels: with the prompt and without guidance.
        blank: without a prompt.
        estimates: of the guided run along its steps, one (B, C, H/f, W/f) for each column of the grid.
    """

    prompts: tuple[str, ...]
    latents: Float32
    pixels: Float32
    plain: Float32
    plain_pixels: Float32
    blank: Float32
    estimates: tuple[Float32, ...]


def check_vae(probe: Probe, generated: Samples, images: Float32 | None) -> Check:
    """Are latents of images, times the scaling factor, what the U-Net was trained on, and do images come back?

    Args:
        probe: of the pipeline.
        generated: stands in for images that were not given. What a decoder generated is natural to its encoder, so a
            wrong factor shows in them too: they come back at another scale than they left.
        images: (B, 3, H, W) float32 in -1..1.
    """
    given = images is not None
    pixels = images if images is not None else generated.plain_pixels.transpose(0, 3, 1, 2) * 2 - 1
    latents = probe.encode(np.ascontiguousarray(pixels, np.float32))
    figures: dict[str, Any] = {"pictures": "given" if given else "drawn", **moments(latents), "channel_std": [
        round(float(s), 4) for s in latents.std(axis=(0, 2, 3))], "scaling_factor": probe.roles.codec.scaling_factor}
    seen = np.clip(pixels.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    back = probe.decode(latents)
    figures["reconstruction_psnr_db"] = min(psnr_db(a, b) for a, b in zip(seen, back, strict=True))
    deviation, decibels = figures["std"], figures["reconstruction_psnr_db"]
    low, high = LIMITS.latent_std
    if not low <= deviation <= high:
        fitting = probe.roles.codec.scaling_factor / deviation
        return Check("vae", False, f"latents of images have a deviation of {deviation:.2f}, expected about 1 "
                     f"({low} to {high})", f"set scaling_factor in the model's vae/config.json: {fitting:.4g} would fit"
                     + ("" if given else "; give images of your own with --image to be sure"), figures)
    if decibels < LIMITS.reconstruction_psnr_db:
        return Check("vae", False, f"an image that is encoded and decoded comes back at {decibels:.1f} dB, expected "
                     f"{LIMITS.reconstruction_psnr_db:.0f} or more", "the autoencoder's weights or precision are at "
                     "fault: compare it with its source by `verify`, or build with another --vae", figures)
    return Check("vae", True, f"latents have a deviation of {deviation:.2f}, images come back at {decibels:.1f} dB",
                 figures=figures)


def check_unconditional(probe: Probe, generated: Samples, images: Float32 | None) -> Check:
    """Does the U-Net know noise from image without a prompt, and does its sampler end at latents of an image?

    Noise is added to the latents of `images`, (B, 3, H, W) float32 in -1..1, or to the generated ones.
    """
    latents = generated.plain if images is None else probe.encode(images)
    errors = {t: noise_error(probe, latents, ("",) * len(latents), t) for t in probe.levels}
    relative = {t: error / probe.signal(t) for t, error in errors.items()}
    mean, sample = float(np.mean(list(relative.values()))), moments(generated.blank)
    figures: dict[str, Any] = {"noise_error": {str(t): e for t, e in errors.items()},
               "relative_noise_error": {str(t): e for t, e in relative.items()},
               "mean_relative_noise_error": mean, "sample": sample}
    low, high = LIMITS.sample_std
    if not mean <= LIMITS.noise_error:
        return Check("unconditional", False, f"predicted noise is off by {mean:.2f} of what a linear guess is off by, "
                     f"expected less than {LIMITS.noise_error}", "the U-Net's weights, or prediction_type or betas in "
                     "scheduler_config.json, are not those of its training", figures)
    if not low <= sample["std"] <= high:
        return Check("unconditional", False, f"images without a prompt end with a deviation of {sample['std']:.2f}, "
                     f"expected {low} to {high}", "predictions are right and the sampler is not: look at the timesteps "
                     "and prediction_type in scheduler_config.json, or try more steps", figures)
    return Check("unconditional", True, f"predicted noise is off by {mean:.2f} of what a linear guess is off by",
                 figures=figures)


def check_text(probe: Probe, generated: Samples) -> Check:
    """Does the prompt change what the U-Net predicts, and is it the right prompt that explains an image best?

    The second is the classifier of Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier, arXiv
    2303.16203, eq. 6, over the prompts generated.
    """
    blank = ("",) * len(generated.prompts)
    response = {t: relative_l2(*(probe.predict(generated.latents, texts, t)[1] for texts in (blank, generated.prompts)))
                for t in probe.levels}
    strongest, found = max(response.values()), prompts_found(probe, generated.latents, generated.prompts)
    figures = {"response": {str(t): r for t, r in response.items()}, "strongest_response": strongest,
               "prompts_found": found, "prompts": list(generated.prompts)}
    if not strongest >= LIMITS.text_response:
        return Check("text", False, f"a prompt changes the prediction by {strongest:.2g} at most, expected "
                     f"{LIMITS.text_response} or more", "the prompt does not reach the U-Net: look at the text "
                     "encoder's weights and tokenizer, and at the U-Net's cross-attention (attn2)", figures)
    if not found >= LIMITS.prompts_found:
        return Check("text", False, f"the prompt that an image was made from explains it best in {found:.0%} of "
                     f"images, expected {LIMITS.prompts_found:.0%} or more", "prompts mean something else than in "
                     "training: are tokenizer and text encoder this model's?", figures)
    return Check("text", True, f"prompts change the prediction by up to {strongest:.2g}; {found:.0%} of images are "
                 "explained best by their own", figures=figures)


def check_guidance(probe: Probe, generated: Samples) -> Check:
    """Does guidance move images, towards their prompts, without burning them out?"""
    moved = relative_l2(generated.plain, generated.latents)
    burnt = clipped(generated.pixels) - clipped(generated.plain_pixels)
    guided, plain = (evidence(probe, latents, generated) for latents in (generated.latents, generated.plain))
    figures = {"moved": moved, "clipped": clipped(generated.pixels), "clipped_without": clipped(generated.plain_pixels),
               "std": moments(generated.latents)["std"], "std_without": moments(generated.plain)["std"],
               "evidence": guided, "evidence_without": plain}
    if not moved >= LIMITS.text_response:
        return Check("guidance", False, f"guidance changes images by {moved:.2g}, expected {LIMITS.text_response} or "
                     "more", "predictions with and without the prompt are the same: was the model trained with prompts "
                     "left out at times, and is it a distilled one, which needs none?", figures)
    if not guided >= plain / 2:
        return Check("guidance", False, f"guided images show their prompts less ({guided:.2g}) than those without "
                     f"guidance ({plain:.2g})", "guidance leads away from the prompt: the empty prompt's embedding "
                     "is not that of training", figures)
    if not burnt <= LIMITS.clipped:
        return Check("guidance", False, f"guidance clips {burnt:.0%} more of all pixel values to black or white",
                     "lower --guidance, or use --guidance-rescale 0.7", figures)
    return Check("guidance", True, f"guidance moves images by {moved:.2g} and clips {burnt:+.1%} of pixel values",
                 figures=figures)


def moments(latents: Float32) -> dict[str, float]:
    """Mean, standard deviation and kurtosis (3 for a normal distribution) of latents of any shape, float32.

    Raises:
        ParityError: they are not finite.
    """
    values = latents.astype(np.float64)
    if not np.isfinite(values).all():
        raise ParityError("latents are not finite", where="diagnose", fix="build in a higher precision")
    mean, deviation = values.mean(), values.std()
    kurtosis = ((values - mean) ** 4).mean() / deviation**4 if deviation else float("inf")
    return {"mean": float(mean), "std": float(deviation), "kurtosis": float(kurtosis)}


def noise_error(probe: Probe, latents: Float32, prompts: tuple[str, ...], timestep: int) -> float:
    """Mean squared error of the noise predicted in latents (B, C, H/f, W/f) float32; 1 is a prediction of nothing."""
    noise, predicted = probe.predict(latents, prompts, timestep)
    return float(np.mean((predicted - noise).astype(np.float64) ** 2))


def explained(probe: Probe, latents: Float32, prompts: tuple[str, ...]) -> NDArray[np.float64]:
    """Squared error of predicted noise for each image (rows) under each prompt, at the middle of the schedule.

    Latents (B, C, H/f, W/f) float32 -> (B, prompts) float64.
    """
    table = np.zeros((len(latents), len(prompts)))
    for timestep in probe.levels[len(probe.levels) // 2 - 1 : len(probe.levels) // 2 + 1]:
        for column, prompt in enumerate(prompts):
            noise, predicted = probe.predict(latents, (prompt,) * len(latents), timestep)
            table[:, column] += np.mean((predicted - noise).astype(np.float64) ** 2, axis=(1, 2, 3))
    return table


def prompts_found(probe: Probe, latents: Float32, prompts: tuple[str, ...]) -> float:
    """Share of images, by latents (B, C, H/f, W/f) float32, whose own prompt explains them best."""
    table = explained(probe, latents, prompts)
    return float(np.mean([all(row[i] < v for j, v in enumerate(row) if j != i) for i, row in enumerate(table)]))


def evidence(probe: Probe, latents: Float32, generated: Samples) -> float:
    """How much larger the squared error of noise predicted in latents is under other prompts than under their own.

    Latents are (B, C, H/f, W/f) float32.
    """
    table = explained(probe, latents, generated.prompts)
    own = np.eye(len(table), dtype=bool)
    return float(table[~own].mean() - table[own].mean())


def clipped(pixels: Float32) -> float:
    """Share of pixel values, any shape, float32 in 0..1, that are black or white: 0 to 1."""
    return float(np.mean((pixels <= 0) | (pixels >= 1)))
