"""Whether both sides of a case did the same, and what differs first if not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tests.fuzz.trace import Array, Codebook, Stopped, Trace

PSNR_DB = 60.0
CONTRAST = 0.05  # images of less standard deviation prove nothing
# Relative L2: conditions are float32 sums in another order; a sample adds up the rounding of all steps before.
CONDITIONS, SAMPLES, TIMESTEPS = 1e-4, 1e-3, 1e-5
ROUNDING = 16 * 2.0**-24  # of a squared distance in float32, relative to the squared lengths that it is a sum of
# Places in the model's files: what is wrong there must be said when it is built.
OF_THE_MODEL = ("scheduler_config", "unet", "vae", "text_encoder", "tokenizer", "model_index")


SAME = ("equal", "flat", "near tie")  # statuses of cases in which both sides do the same


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Attributes:
        status: "equal"; "flat": equal without contrast; "near tie": equal but for entries of a codebook between which
            rounding decides; "refused": by us, in one line, in time; "refused by both"; "unverified": only ours runs
            it; "known fault": of diffusers; "different": a failure.
        reason: what differs first, or why it was refused, without numbers and names of files.
        detail: the same with them.
        diffusers_runs: whether diffusers gave a finite result.
    """

    status: str
    reason: str = ""
    detail: str = ""
    diffusers_runs: bool = True


def judge(mine: Trace | Stopped, theirs: Trace | Stopped) -> Verdict:
    """Compare what both sides did."""
    broken = isinstance(theirs, Stopped) or theirs.result is None or not all(
        np.isfinite(array).all() for array in (theirs.result, *theirs.decoded))  # Pillow makes black of NaN
    if isinstance(mine, Stopped):
        detail = f"{mine.stage}: {mine.kind}: {mine.text} [{mine.where}]"
        reason = normalized(f"{mine.text}")
        if mine.exit_code != 2 and not (broken and mine.exit_code == 3):
            return Verdict("different", f"crash: {mine.kind}: {reason}", detail, not broken)
        if mine.stage == "request" and not broken and (
                mine.networks_ran or any(name in mine.where for name in OF_THE_MODEL)):
            return Verdict("different", f"refused too late: {reason}", detail)
        if broken:
            return Verdict("refused by both", reason, f"{detail}; diffusers: {_why(theirs)}", False)
        return Verdict("refused", f"{mine.stage}: {reason}", detail)
    if broken:
        return Verdict("unverified", f"diffusers: {normalized(_why(theirs))}", _why(theirs), False)
    assert isinstance(theirs, Trace)
    if (found := first_difference(mine, theirs)) is not None:
        if found[0] == "images" and theirs.codebook is not None:
            return _judge_codes(mine, theirs, theirs.codebook, found)
        return Verdict("different", found[0], f"{found[0]}: {found[1]}")
    assert theirs.result is not None
    flat = theirs.result.ndim == 4 and theirs.result.shape[-1] == 3 and theirs.result.std() < CONTRAST
    return Verdict("flat" if flat else "equal")


def _judge_codes(mine: Trace, theirs: Trace, codebook: Codebook, found: tuple[str, str]) -> Verdict:
    """Images of a model with a codebook differ although the latents before the codebook agree.

    A latent nearly as near to a second entry may get either, since both sides round: by the difference of their
    latents, and by how they compute distances (torch.cdist keeps |z|^2, of which the difference of two entries is a
    small part where latents are large). Every other entry must be the same, and diffusers' decoder must make our image
    of the entries that we chose: a fault in the lookup, the scale or the decoder is neither.
    """
    latents, expected = (np.concatenate(side.decoded).astype(np.float64) for side in (mine, theirs))
    ours, other = (np.concatenate(side.codes) for side in (mine, theirs))
    rows, moved = _rows(latents), np.linalg.norm(_rows(latents) - _rows(expected), axis=1)
    entries = codebook.entries.astype(np.float64)
    near, second = entries[ours], entries[other]
    gap = np.abs(np.sum((rows - near) ** 2, axis=1) - np.sum((rows - second) ** 2, axis=1))
    longest = np.linalg.norm(rows, axis=1) + np.maximum(np.linalg.norm(near, axis=1), np.linalg.norm(second, axis=1))
    tied = gap <= ROUNDING * longest**2 + 2 * moved * np.linalg.norm(near - second, axis=1)
    if not tied.all():
        detail = f"{np.sum(~tied)} of {len(ours)} latents have an entry that no rounding explains"
        return Verdict("different", "entries of the codebook", f"entries of the codebook: {detail}")
    assert mine.result is not None
    batch, _, height, width = latents.shape
    image = codebook.image_of(ours.reshape(batch, height, width))
    if (figure := psnr(mine.result, image)) < PSNR_DB:
        return Verdict("different", found[0], f"{found[0]}: {found[1]}; {figure:.1f} dB of the same entries")
    return Verdict("near tie", "entries of a codebook between which rounding decides",
                   f"{np.sum(ours != other)} of {len(ours)} entries; {figure:.1f} dB of the same entries")


def _rows(latents: Array) -> Array:
    return latents.transpose(0, 2, 3, 1).reshape(-1, latents.shape[1])


def _why(side: Trace | Stopped) -> str:
    return f"{side.stage}: {side.kind}: {side.text}" if isinstance(side, Stopped) else "its result is not finite"


def first_difference(mine: Trace, theirs: Trace) -> tuple[str, str] | None:
    """What differs first, in the order in which an error spreads, and by how much; None if nothing does."""
    for image in mine.encoded:  # theirs also encodes the masked image of U-Nets that do not take it
        for row in image:
            if not any(row.shape == other.shape and _close(row, other, CONDITIONS)
                       for found in theirs.encoded for other in found):
                return "encoded image", f"shape {row.shape}, theirs {[e.shape for e in theirs.encoded]}"
    for i, (ours, other) in enumerate(zip(mine.calls, theirs.calls, strict=False)):
        if (found := _call_difference(ours, other, i)) is not None:
            return found
    if len(mine.calls) != len(theirs.calls):
        return "number of denoiser calls", f"ours {len(mine.calls)}, theirs {len(theirs.calls)}"
    if theirs.decoded and mine.decoded:
        latents, expected = np.concatenate(mine.decoded), np.concatenate(theirs.decoded)
        if latents.shape != expected.shape or not _close(latents, expected, SAMPLES):
            return "decoded latents", _amount(latents, expected)
    return _result_difference(mine.result, theirs.result)


def _call_difference(mine: dict[str, Array], theirs: dict[str, Array], i: int) -> tuple[str, str] | None:
    names = ("timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond", "sample")
    for name in names:
        ours, other = mine.get(name), theirs.get(name)
        if ours is None and other is None:
            continue
        if ours is None or other is None:
            return name, f"call {i}: only {'diffusers' if ours is None else 'we'} feed it"
        if ours.shape != other.shape:
            return f"shape of {name}", f"call {i}: ours {ours.shape}, theirs {other.shape}"
        tolerance = {"timestep": TIMESTEPS, "sample": SAMPLES}.get(name, CONDITIONS)
        # Timesteps near zero are differences of larger numbers.
        near = name == "timestep" and np.abs(ours - other).max() <= 1e-4
        if not near and not _close(ours, other, tolerance):
            return name, f"call {i}: {_amount(ours, other)}"
    return None


def _result_difference(mine: Array | None, theirs: Array | None) -> tuple[str, str] | None:
    assert mine is not None and theirs is not None
    if mine.shape != theirs.shape:
        return "shape of the result", f"ours {mine.shape}, theirs {theirs.shape}"
    if mine.shape[-1] != 3:  # latents
        return None if _close(mine, theirs, SAMPLES) else ("latents", _amount(mine, theirs))
    figure = psnr(mine, theirs)
    return None if figure >= PSNR_DB else ("images", f"{figure:.1f} dB")


def psnr(mine: Array, theirs: Array) -> float:
    """In dB, of numbers in 0..1."""
    error = float(np.mean((mine.astype(np.float64) - theirs) ** 2))
    return float(-10 * np.log10(max(error, 1e-20)))


def _close(mine: Array, theirs: Array, tolerance: float) -> bool:
    scale = max(float(np.linalg.norm(theirs.astype(np.float64))), 1e-6)
    return bool(np.linalg.norm(mine.astype(np.float64) - theirs) <= tolerance * scale)


def _amount(mine: Array, theirs: Array) -> str:
    if mine.size <= 8 or mine.ndim == 1:
        return f"ours {np.unique(mine)[:4].tolist()}, theirs {np.unique(theirs)[:4].tolist()}"
    if mine.shape != theirs.shape:
        return f"ours {mine.shape}, theirs {theirs.shape}"
    rows = [i for i in range(len(mine)) if not _close(mine[i], theirs[i], 1e-4)]
    error = np.linalg.norm(mine.astype(np.float64) - theirs) / max(float(np.linalg.norm(theirs)), 1e-12)
    return f"relative L2 {error:.3g}, rows {rows} of {len(mine)}"


def normalized(text: str) -> str:
    """A message without its numbers, names in quotes and paths."""
    text = re.sub(r"/\S+", "PATH", text.partition("\n")[0])
    text = re.sub(r"'[^']*'", "'...'", text)
    return re.sub(r"-?\d[\d.,e+-]*", "N", text)[:160]
