"""What a comparison draws and how: prompts, samplers, steps, sizes. Every default in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtimes.backends.session import SessionOptions

# Things that any text-to-image model knows; a build of the reference model passes the model's own subjects.
PROMPTS = (
    "a red apple", "a cat", "a yellow bus", "a green tree", "a house by the sea", "a cup of coffee", "a guitar",
    "a smiling face",
)


@dataclass(frozen=True)
class ParityOptions:
    """Settings of all three levels.

    Attributes:
        prompts: drawn at trajectory and image level; those of the component level are taken from them too.
        schedulers: keys of `runtimes.schedulers.SCHEDULERS`; every prompt is drawn with every one.
        steps: denoising steps at trajectory and image level, and for retrieval.
        recording_steps: denoising steps of the runs that component inputs are recorded from.
        guidance_scale: of classifier-free guidance, in every run.
        seed: of the initial latents and of the samplers that draw noise.
        height, width: pixels at trajectory and image level; the pipeline's default if None.
        retrieval_prompts: names of gallery tiles to draw and find again; none leaves retrieval out.
        retrieval_scheduler: key of `SCHEDULERS` for them.
        allow_scheduler_change: a build may replace the noise schedule on purpose (a distilled model's).
        session: device and threads of the candidate.
        small: see `shapes.plan_runs`: for networks that take minutes a call.
        keep_bytes: networks stay loaded together if all of a bundle's are smaller than this; above it one at a time.
    """

    prompts: tuple[str, ...] = PROMPTS
    schedulers: tuple[str, ...] = ("ddim", "dpm++")
    steps: int = 25
    recording_steps: int = 5
    guidance_scale: float = 5.0
    seed: int = 0
    height: int | None = None
    width: int | None = None
    retrieval_prompts: tuple[str, ...] = ()
    retrieval_scheduler: str = "ddim"
    allow_scheduler_change: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)
    small: bool = False
    keep_bytes: int = 1 << 30
