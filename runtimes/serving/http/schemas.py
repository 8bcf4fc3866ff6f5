"""The bodies of OpenAI's Images API and of jobs, checked by pydantic; ranges and help texts are those of `Request`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtimes.inputs.noise import LEAST_SEED, MOST_SEED
from runtimes.inputs.request import Request

MOST_TEXT = 32_000  # characters, as OpenAI has it
MOST_N, MOST_STEPS, MOST_PARTIAL = 64, 10_000, 3
QUALITIES = {"low": "draft", "draft": "draft", "auto": "standard", "medium": "standard", "standard": "standard",
             "high": "high", "hd": "high"}
AS_OPENAI = {"draft": "low", "standard": "medium", "high": "high"}
Quality = Literal["auto", "low", "medium", "high", "draft", "standard", "hd"]
Kind = Literal["png", "jpeg", "webp"]
Size = Annotated[str | None, Field(description="auto, or WIDTHxHEIGHT in pixels as the model makes it.",
                                   pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", examples=["auto", "512x768"])]
_REQUEST = {declared.name: declared.metadata for declared in dataclasses.fields(Request)}


def said(name: str, **more: Any) -> Any:
    """A field of pydantic's with the help text and the range of a field of `Request`.

    Args:
        name: of the field of `Request`.
        more: arguments of `pydantic.Field`.
    """
    limits = _REQUEST[name]
    text = f"{limits['help'][0].upper()}{limits['help'][1:]}."
    if "choices" in limits:
        text += f" One of {', '.join(limits['choices'])}."
    if "default" in limits:
        text += f" Default: {limits['default']}."
    names = {"least": "ge", "most": "le", "above": "gt"}
    return Field(description=text, **{names[key]: limits[key] for key in names if key in limits}, **more)


class Body(BaseModel):
    """A body of which every field is known, of the right type, and finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Body):
    """What `Request` has beyond OpenAI's fields. The official client sends them by `extra_body`."""

    negative_prompt: Annotated[str | None, said("negative_prompt", max_length=MOST_TEXT)] = None
    seed: Annotated[Annotated[int, Field(ge=LEAST_SEED, le=MOST_SEED)]
                    | Annotated[list[Annotated[int, Field(ge=LEAST_SEED, le=MOST_SEED)]],
                                Field(min_length=1, max_length=MOST_N)] | None, said("seed")] = None
    num_inference_steps: Annotated[int | None, said("steps", le=MOST_STEPS, examples=[20])] = None
    guidance_scale: Annotated[float | None, said("guidance_scale", ge=-1e4, le=1e4)] = None
    scheduler: Annotated[str | None, said("scheduler", max_length=64)] = None
    aspect: Annotated[str | None, said("aspect", max_length=32, examples=["16:9"])] = None
    eta: Annotated[float | None, said("eta")] = None
    guidance_rescale: Annotated[float | None, said("guidance_rescale")] = None
    guidance_interval: Annotated[list[Annotated[float, Field(ge=0, le=1)]] | None,
                                 said("guidance_interval", min_length=2, max_length=2, examples=[[0.0, 1.0]])] = None
    weighting: Annotated[bool | None, said("weighting")] = None
    long_prompts: Annotated[bool | None, said("long_prompts")] = None
    cache_interval: Annotated[int | None, said("cache_interval", le=MOST_STEPS)] = None
    tile: Annotated[int | None, said("tile", le=1 << 16)] = None


class ImageBody(Sampling):
    """What generations, edits and jobs have in common."""

    prompt: Annotated[str, said("prompt", max_length=MOST_TEXT, examples=["a red apple"])]
    model: Annotated[str | None, Field(description="Name of a served bundle, as GET /v1/models lists them. Default: "
                                       "the first.", max_length=200)] = None
    n: Annotated[int | None, said("images_per_prompt", le=MOST_N)] = None
    size: Size = None
    quality: Annotated[Quality | None, Field(description="low and draft: the fastest setting measured of this bundle "
                                             "whose images are still good; auto, medium and standard: in between; high "
                                             "and hd: the most accurate. Fields given beside it overrule it.")] = None
    output_format: Annotated[Kind | None, Field(description="How images are written. Default: png.")] = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="Quality of jpeg and webp; png has none. "
                                                    "Default: 100.")] = None
    background: Annotated[Literal["auto", "opaque"] | None,
                          Field(description="Images are opaque: transparent is refused.")] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="Accepted without effect.")] = None
    user: Annotated[str | None, Field(description="Accepted without effect.", max_length=512)] = None
    safety_identifier: Annotated[str | None, Field(description="Accepted without effect.", max_length=512)] = None

    def sampling(self) -> dict[str, Any]:
        """Fields of `Request` that were given, by its names; size and quality apart."""
        given = {name: getattr(self, name) for name in Sampling.model_fields if getattr(self, name) is not None}
        if "num_inference_steps" in given:
            given["steps"] = given.pop("num_inference_steps")
        return {"prompt": self.prompt, "images_per_prompt": self.n or 1, **given}


class Answered(ImageBody):
    """How a synchronous request is answered."""

    response_format: Annotated[Literal["url", "b64_json"] | None, Field(
        description="b64_json sends the images, url addresses of them on this server. Default: b64_json.")] = None
    stream: Annotated[bool | None, Field(description="Answer by server-sent events.")] = None
    partial_images: Annotated[int | None, Field(ge=0, le=MOST_PARTIAL, description="How many previews a stream shows "
                                                "before each image.")] = None


class GenerationBody(Answered):
    """POST /v1/images/generations."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"prompt": "a red apple"}, {"prompt": "a red apple", "n": 2, "size": "auto", "quality": "standard", "seed": 7,
                                    "num_inference_steps": 10, "output_format": "webp"}]})


class EditBody(Answered):
    """The fields of POST /v1/images/edits beside its files."""

    strength: Annotated[float | None, said("strength")] = None

    def sampling(self) -> dict[str, Any]:
        """Those of a generation, and the strength."""
        return super().sampling() | ({} if self.strength is None else {"strength": self.strength})


class JobBody(ImageBody):
    """POST /v1/jobs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "a red apple", "seed": 7}]})

    image: Annotated[str | None, Field(description="Start from this PNG, JPEG or WebP image, base64 or a data: URL. "
                                       "Other URLs are refused.")] = None
    mask: Annotated[str | None, Field(description="An image of the same size whose fully transparent places are "
                                      "painted anew, base64 or a data: URL.")] = None
    strength: Annotated[float | None, said("strength")] = None
    priority: Annotated[int | None, Field(ge=-10, le=10, description="Higher ones run first; waiting raises it. "
                                          "Default: 0.")] = None
    deadline_seconds: Annotated[float | None, Field(gt=0, le=31_536_000, description="From now; a job that was not "
                                                    "started by then fails.")] = None

    def sampling(self) -> dict[str, Any]:
        """Those of a generation, and the strength."""
        return super().sampling() | ({} if self.strength is None else {"strength": self.strength})


# ---- answers -----------------------------------------------------------------------------------------------------


class TokenDetails(BaseModel):
    """What `input_tokens` counts."""

    text_tokens: int = Field(description="Words of the prompt and the negative prompt.")
    image_tokens: int = Field(description="Images that were sent.")


class Usage(BaseModel):
    """What a request used, under OpenAI's names. Nothing is billed by it."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int = Field(description="Denoising steps of all images; 0 for images that were in the cache.")
    total_tokens: int


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="That makes this image again.")
    flagged: bool | None = Field(description="Whether the bundle's safety checker flags it; null where none looked.")


class ImagesAnswer(BaseModel):
    """OpenAI's answer to generations and edits."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"]
    output_format: Kind
    quality: Literal["low", "medium", "high"]
    size: str
    usage: Usage
    model: str
    digest: str = Field(description="Of the bundle that made the images.")
    cached: bool = Field(description="Whether they were in the cache.")


class ModelAnswer(BaseModel):
    """A served bundle: OpenAI's four fields, and what it makes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    digest: str
    family: str
    precision: str
    size: str = Field(description="Of an image by default.")
    heights: dict[str, int] = Field(description="Least and most in pixels, and what they are multiples of.")
    widths: dict[str, int]
    schedulers: list[str]
    qualities: list[str] = Field(description="draft, standard and high as far as they were measured.")
    presets: dict[str, dict[str, Any]] = Field(description="What each quality stands for: steps, scheduler and further "
                                               "fields of a request; empty for the model's defaults.")
    edits: bool = Field(description="Whether it takes an image, and a mask over one.")
    inpaints: bool = Field(description="Whether it was trained for masks.")
    takes_prompt: bool
    safety_checker: bool
    steps: int = Field(description="Steps by default.")
    limits: dict[str, int] = Field(description="Of this server: images, pixels and steps of one request.")


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class JobImage(BaseModel):
    """One image of a job."""

    url: str
    sha256: str
    kind: Kind
    bytes: int
    seed: int
    flagged: bool | None


class JobAnswer(BaseModel):
    """A job."""

    id: str
    object: Literal["job"]
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    created_at: int
    ended_at: int | None
    position: int = Field(description="Jobs before it while it is queued.")
    step: int = Field(description="Finished steps while it runs.")
    total: int = Field(description="Steps of all; 0 before the first.")
    attempts: int
    reason: str | None = Field(description="Why it failed or was cancelled.")
    digest: str | None = Field(description="Of the bundle that made the images.")
    seconds: float | None = Field(description="From the first step to the last decoded image; null where none ran.")
    request: dict[str, Any] = Field(description="Fields as they decide the images, the seeds among them; files by "
                                    "their sha256.")
    images: list[JobImage]


class JobList(BaseModel):
    """Jobs, the newest first."""

    object: Literal["list"]
    data: list[JobAnswer]
    has_more: bool
