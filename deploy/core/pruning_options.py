"""The options of a build spec for smaller networks: `--prune`, `--prune-vae`, `--recover` and refinements."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from runtimes.errors import InputError

TRAJECTORIES = 32  # of the teacher that one step of a recovery learns from


class PruningOptions(BaseModel):
    """What is removed from the denoiser and the autoencoder, and how they recover (`deploy.pruning`).

    Descriptions, defaults and ranges are the help texts of the options of the same names.
    """

    prune: float = Field(default=0.0, ge=0, lt=1, description=(
        "share of the denoiser's channels to remove; several with commas, 0.5,0.3, of `build` alone: the largest that "
        "keeps the accuracy budget; nothing is pruned if none does"))
    prune_candidates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(), description=(
        "several shares, of which the largest within the accuracy budget is taken"))
    prune_vae: float = Field(default=0.0, ge=0, lt=1, description=(
        "share of the autoencoder's channels to remove, of encoder and decoder alike"))
    prune_method: Literal["taylor", "l1", "l2"] = Field(
        default="taylor", description="measure of a channel's importance")
    prune_widths: Literal["uniform", "sensitivity"] = Field(default="uniform", description=(
        "how the share is spread over the denoiser's levels; sensitivity: more where the output changes less"))
    prune_blocks: Literal["none", "base", "small", "tiny"] = Field(default="none", description=(
        "whole blocks to remove first, by BK-SDM's sets, of which base removes least and tiny most"))
    mask: Literal["none", "textbook", "2:4"] = Field(default="none", description=(
        "weights to set to zero without a change of shapes"))
    recover: int = Field(default=0, ge=0, description=(
        "optimizer steps of distillation from the original, for each network that was pruned"))
    recover_batch: int = Field(default=TRAJECTORIES, ge=1, le=TRAJECTORIES, description=(
        "images that the original generates at a time during recovery; fewer take less memory, and a step averages "
        f"the gradients of as many such batches as make {TRAJECTORIES} images or more"))
    recover_prompts: tuple[str, ...] = Field(
        default=(), description="file with the prompts of the recovery, one a line",
        json_schema_extra={"default_text": "the model's own set"})

    @property
    def prunes(self) -> bool:
        """Whether a network will differ from its source by more than rounding."""
        return self.prunes_denoiser or self.prune_vae > 0

    @property
    def prunes_denoiser(self) -> bool:
        """Whether the denoising network is one of them."""
        return self.prune > 0 or bool(self.prune_candidates) or self.prune_blocks != "none" or self.mask != "none"

    @model_validator(mode="after")
    def _one_share_or_several(self) -> PruningOptions:
        if self.prune and self.prune_candidates:
            raise InputError("prune and prune_candidates are both given", where="--prune", fix="give one of them")
        return self

    @model_validator(mode="after")
    def _recovers_from_something(self) -> PruningOptions:
        if self.recover and not self.prunes:
            raise InputError("nothing is pruned that could recover", where="--recover",
                             fix="give --prune, --prune-vae, --prune-blocks or --mask, too")
        if self.recover_prompts and not self.recover:
            raise InputError("prompts to distil on, but no steps", where="--recover-prompts", fix="give --recover, too")
        return self


def parse_shares(text: str) -> dict[str, Any]:
    """Read `--prune`: one share of channels, several with commas, or nothing, as fields of `PruningOptions`.

    Raises:
        InputError: not numbers.
    """
    if not text:
        return {}
    shares = tuple(_share(part.strip()) for part in text.split(","))
    return {"prune": shares[0]} if len(shares) == 1 else {"prune_candidates": shares}


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r} is not a share of channels", where="--prune",
                         fix="write 0.3, or several to choose from: 0.5,0.3,0.15") from None
