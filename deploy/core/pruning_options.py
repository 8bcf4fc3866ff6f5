"""The part of a build spec that asks for smaller networks: `--prune`, `--prune-vae`, `--recover`, refinements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from runtimes.errors import InputError

TRAJECTORIES = 32  # of the teacher that one step of a recovery learns from


class PruningOptions(BaseModel):
    """What is taken out of the denoising network and the autoencoder, and how they learn to do without.

    Attributes:
        prune: share of its channels to remove, 0 to 1 (`deploy.pruning.shrink.widths`).
        prune_candidates: several shares, of which the largest that keeps the budget is taken, or none at all
            (`deploy.building.choose_share`).
        prune_vae: share of the autoencoder's channels to remove, of encoder and decoder alike, 0 to 1
            (`deploy.pruning.narrow_autoencoder`).
        prune_method: what a channel's importance is (`deploy.pruning.shrink.importance`).
        prune_widths: every level loses the same share, or each as much as the output bears
            (`deploy.pruning.shrink.width_sensitivity`).
        prune_blocks: whole blocks to remove first, named as BK-SDM does (`deploy.pruning.shrink.whole_blocks`).
        mask: weights to set to zero without changing a shape (`deploy.pruning.shrink.zeroed_weights`).
        recover: optimizer steps of distillation from the original, for each network that was pruned
            (`deploy.pruning.recovery.training_loop`).
        recover_batch: images that the teacher generates at a time; with fewer than 32, which take less memory, the
            gradients of several batches make one step of 32.
        recover_prompts: what it is distilled on; the model's own set when empty.
    """

    prune: float = Field(default=0.0, ge=0, lt=1)
    prune_candidates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    prune_vae: float = Field(default=0.0, ge=0, lt=1)
    prune_method: Literal["taylor", "l1", "l2"] = "taylor"
    prune_widths: Literal["uniform", "sensitivity"] = "uniform"
    prune_blocks: Literal["none", "base", "small", "tiny"] = "none"
    mask: Literal["none", "textbook", "2:4"] = "none"
    recover: int = Field(default=0, ge=0)
    recover_batch: int = Field(default=TRAJECTORIES, ge=1, le=TRAJECTORIES)
    recover_prompts: tuple[str, ...] = ()

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


def given_options(prune: str, vae: float, method: str, widths: str, blocks: str, mask: str, recover: int,
                  prompts: Path | None) -> dict[str, Any]:
    """What was given on the command line of the options that shrink networks, as fields of `PruningOptions`.

    Raises:
        InputError: shares that are not numbers, or a file of prompts that cannot be read.
    """
    from calibration.trajectory.prompts import read_prompts

    given = {"prune_vae": vae, "prune_method": method, "prune_widths": widths, "prune_blocks": blocks, "mask": mask,
             "recover": recover, "recover_prompts": read_prompts(prompts) if prompts else (), **parse_shares(prune)}
    return {name: value for name, value in given.items() if value}


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r} is not a share of channels", where="--prune",
                         fix="write 0.3, or several to choose from: 0.5,0.3,0.15") from None
