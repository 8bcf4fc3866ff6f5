"""Measures distances between what the reference and the candidate computed. NumPy only; a NaN never passes.

Everything is accumulated in float64. Reference and candidate have the same shape; their dtypes may differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import InputError

Array = np.ndarray[Any, Any]

MAX_PSNR_DB = 160.0  # float32's own rounding of pixels in [0, 1] is about 145 dB; also keeps JSON free of infinities
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Comparison:
    """One measured figure against its tolerance: truthy if and only if it passes.

    Attributes:
        metric: "relative_l2", "psnr_db", "ssim", ...
        measured: the figure; NaN and infinity never pass.
        tolerance: the largest figure allowed, or the smallest one if `larger_is_better`.
        numbers: figures measured beside it, for the record.
    """

    metric: str
    measured: float
    tolerance: float
    larger_is_better: bool = False
    numbers: TensorErrors | None = None

    def __bool__(self) -> bool:
        if not math.isfinite(self.measured) or (self.numbers is not None and self.numbers.nonfinite):
            return False
        return self.measured >= self.tolerance if self.larger_is_better else self.measured <= self.tolerance

    @property
    def would_pass(self) -> float | None:
        """The tolerance that would have passed, rounded to 3 digits on the safe side; none does for a NaN."""
        if not math.isfinite(self.measured) or (self.numbers is not None and self.numbers.nonfinite):
            return None
        if self.measured == 0:
            return 0.0
        unit = 10.0 ** (math.floor(math.log10(abs(self.measured))) - 2)
        direction = math.floor if self.larger_is_better else math.ceil
        rounded = direction(self.measured / unit) * unit
        # Dividing and multiplying by `unit` may land one ulp on the wrong side.
        return min(rounded, self.measured) if self.larger_is_better else max(rounded, self.measured)

    def __str__(self) -> str:
        relation = "at least" if self.larger_is_better else "at most"
        passing = self.would_pass
        remedy = "no tolerance passes" if passing is None else f"{passing:.4g} would have passed"
        verdict = "" if self else f"; {remedy}"
        return f"{self.metric} is {self.measured:.4g}, the budget is {relation} {self.tolerance:.4g}{verdict}"


@dataclass(frozen=True)
class TensorErrors:
    """How far one tensor is from its reference.

    Attributes:
        max_abs: largest |candidate - reference|; NaN if either holds a NaN.
        relative_l2: ||candidate - reference|| / ||reference||; 0 if both are zero, infinite if only the reference is.
        cosine: of the angle between them as vectors; 1 if both are zero, 0 if one is.
        nonfinite: number of NaN and infinite values in the candidate.
    """

    max_abs: float
    relative_l2: float
    cosine: float
    nonfinite: int


def tensor_errors(reference: Array, candidate: Array) -> TensorErrors:
    """Errors of the candidate, any values of any shape and real dtype; the reference has the same shape.

    Raises:
        InputError: the shapes differ.
    """
    _check_shapes(reference, candidate)
    nonfinite = int(candidate.size - np.count_nonzero(np.isfinite(candidate)))
    r, c = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    if r.size == 0:
        return TensorErrors(0.0, 0.0, 1.0, 0)
    with np.errstate(all="ignore"):  # infinities make NaNs here, and NaNs are the answer
        difference = np.abs(c - r)
        norm_r, norm_c, norm_d = (float(np.linalg.norm(v)) for v in (r, c, difference))
        maximum = float(difference.max())
        cosine = float(r @ c) / (norm_r * norm_c) if norm_r and norm_c else float(norm_r == norm_c)
    relative = norm_d / norm_r if norm_r else (0.0 if norm_d == 0 else norm_d * math.inf)
    return TensorErrors(maximum, relative, cosine, nonfinite)


def compare_tensors(reference: Array, candidate: Array, tolerance: float) -> Comparison:
    """Compare two tensors by relative L2 error: any values of the same shape, any real dtypes.

    `numbers` holds max_abs, cosine and the non-finite count.

    Raises:
        InputError: the shapes differ.
    """
    errors = tensor_errors(reference, candidate)
    return Comparison("relative_l2", errors.relative_l2, tolerance, numbers=errors)


def relative_l2(reference: Array, candidate: Array) -> float:
    """Error ||candidate - reference|| / ||reference|| over all elements of two arrays of the same shape, any dtypes.

    See `TensorErrors`.
    """
    return tensor_errors(reference, candidate).relative_l2


def worst(values: list[float], *, larger_is_better: bool = False) -> float:
    """The worst of some figures: NaN if any is NaN or there are none, where `max` and `min` would lose it."""
    if not values or any(math.isnan(v) for v in values):
        return math.nan
    return min(values) if larger_is_better else max(values)


def psnr_db(reference: Array, candidate: Array, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio, 10 log10(peak² / MSE), in decibels, capped at `MAX_PSNR_DB`.

    Args:
        reference: (..., H, W, C) of any real dtype, pixels in [0, peak].
        candidate: same shape.
        peak: largest possible pixel.

    Raises:
        InputError: the shapes differ.
    """
    _check_shapes(reference, candidate)
    with np.errstate(all="ignore"):
        error = float(np.mean((candidate.astype(np.float64) - reference.astype(np.float64)) ** 2))
    if math.isnan(error) or math.isinf(error):
        return math.nan
    return MAX_PSNR_DB if error == 0 else min(MAX_PSNR_DB, 10 * math.log10(peak**2 / error))


def ssim(reference: Array, candidate: Array, peak: float = 1.0) -> float:
    """Structural similarity (Wang, Bovik, Sheikh & Simoncelli 2004, doi:10.1109/TIP.2003.819861), equation 13.

    Gaussian window of 11x11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, only windows that lie inside the image;
    the mean over channels, population covariance: scikit-image's `gaussian_weights=True,
    use_sample_covariance=False`.

    Args:
        reference: (H, W, C) of any real dtype, pixels in [0, peak], H and W at least 11.
        candidate: same shape.
        peak: largest possible pixel.

    Returns:
        at most 1, which only identical images reach.

    Raises:
        InputError: the shapes differ or the images are smaller than the window.
    """
    _check_shapes(reference, candidate)
    if reference.ndim != 3 or min(reference.shape[:2]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs images (H, W, C) of at least {SSIM_WINDOW} pixels, got {reference.shape}")
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    with np.errstate(all="ignore"):
        mean_x, mean_y = _blur(x), _blur(y)
        var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
        covariance = _blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        return float(np.mean(luminance * structure))


def _blur(image: Array) -> Array:
    """Separable Gaussian window over (H, W, C), valid part only: (H-10, W-10, C)."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows = np.lib.stride_tricks.sliding_window_view(image, SSIM_WINDOW, axis=0) @ window
    blurred: Array = np.lib.stride_tricks.sliding_window_view(rows, SSIM_WINDOW, axis=1) @ window
    return blurred


def _check_shapes(reference: Array, candidate: Array) -> None:
    if reference.shape != candidate.shape:
        raise InputError(f"the reference has shape {reference.shape}, the candidate {candidate.shape}")
