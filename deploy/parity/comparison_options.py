"""The options of a comparison, with their defaults: prompts, samplers, steps, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from deploy.core.spec import REFERENCE
from deploy.reference_models import GALLERY_COLUMNS, GALLERY_FILE, GALLERY_TILE, demo_prompts, subject_names
from deploy.reference_models.retrieval import Gallery
from runtimes.backends.session import SessionOptions
from runtimes.system.device import CPU, Device

# Things that any text-to-image model knows; a build of the reference model passes the model's own subjects.
PROMPTS = (
    "a red apple", "a cat", "a yellow bus", "a green tree", "a house by the sea", "a cup of coffee", "a guitar",
    "a smiling face",
)
RETRIEVAL_PROMPTS = 40


@dataclass(frozen=True)
class ParityOptions:
    """Settings of all three levels.

    Attributes:
        prompts: generated at trajectory and image level; those of the component level are taken from them too.
        schedulers: keys of `runtimes.schedulers.SCHEDULERS`; every prompt is generated with every one.
        steps: denoising steps at trajectory and image level, and for retrieval.
        recording_steps: denoising steps of the runs that component inputs are recorded from.
        guidance_scale: of classifier-free guidance, in every run.
        seed: of the initial latents and of the samplers that sample noise.
        height, width: pixels at trajectory and image level; the pipeline's default if None.
        retrieval_prompts: names of gallery tiles to generate and find again; none leaves retrieval out.
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


def options_for(source_id: str, prompts: tuple[str, ...], device: Device = CPU) -> ParityOptions:
    """What is generated: the user's prompts, else the reference model's own subjects, else everyday ones."""
    session = SessionOptions(device)
    if source_id != REFERENCE:
        return ParityOptions(prompts=prompts or PROMPTS, session=session)
    names = subject_names()
    asked = tuple(names[round(i * (len(names) - 1) / (RETRIEVAL_PROMPTS - 1))] for i in range(RETRIEVAL_PROMPTS))
    return ParityOptions(prompts=prompts or demo_prompts()[:8], retrieval_prompts=asked, session=session)


def gallery_for(source_id: str) -> Gallery | None:
    """The images retrieval is scored by: only the reference model has them."""
    if source_id != REFERENCE:
        return None
    return Gallery.load(GALLERY_FILE, subject_names(), columns=GALLERY_COLUMNS, tile=GALLERY_TILE)
