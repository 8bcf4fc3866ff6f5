"""Metrics against known values; NaN never passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deploy.parity.metrics import (
    MAX_PSNR_DB,
    Comparison,
    compare_tensors,
    psnr_db,
    relative_l2,
    ssim,
    tensor_errors,
    worst,
)
from runtimes.errors import InputError

ONES = np.ones((2, 3), np.float32)


def images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((16, 18, 3))
    return reference, np.clip(reference + 0.1 * rng.standard_normal(reference.shape), 0, 1)


def test_identical_tensors_differ_by_nothing():
    errors = tensor_errors(ONES, ONES.astype(np.float16))
    assert (errors.max_abs, errors.relative_l2, errors.nonfinite) == (0, 0, 0)
    assert errors.cosine == pytest.approx(1)


def test_known_distances():
    errors = tensor_errors(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert errors.max_abs == 0.5
    assert errors.relative_l2 == pytest.approx(0.1)
    assert tensor_errors(np.array([1.0, 0.0]), np.array([0.0, 2.0])).cosine == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_never_passes(bad):
    candidate = ONES.copy()
    candidate[1, 2] = bad
    comparison = compare_tensors(ONES, candidate, tolerance=math.inf)
    assert not comparison
    assert comparison.numbers is not None and comparison.numbers.nonfinite == 1
    assert comparison.would_pass is None
    assert "no tolerance passes" in str(comparison)


def test_a_nan_in_both_does_not_pass_either():
    both = np.array([1.0, np.nan])
    assert not compare_tensors(both, both, tolerance=math.inf)


def test_zero_reference_passes_only_zero():
    zeros = np.zeros_like(ONES)
    assert compare_tensors(zeros, zeros, 0.0)
    assert tensor_errors(zeros, zeros).cosine == 1
    assert relative_l2(zeros, ONES) == math.inf
    assert tensor_errors(zeros, ONES).cosine == 0
    assert not compare_tensors(zeros, ONES, 1e9)


def test_empty_tensors_are_equal():
    assert compare_tensors(np.empty((0, 4)), np.empty((0, 4)), 0.0)


def test_other_shapes_are_refused_not_broadcast():
    for metric in (tensor_errors, psnr_db, ssim):
        with pytest.raises(InputError, match="shape"):
            metric(np.ones((12, 12, 3)), np.ones((12, 12, 1)))


@pytest.mark.parametrize("measured", [0.0123456, 9.999e-5, 1.0, 37.26, 123456.0])
@pytest.mark.parametrize("larger_is_better", [False, True])
def test_the_tolerance_that_would_have_passed_passes(measured, larger_is_better):
    impossible = math.inf if larger_is_better else 0.0
    comparison = Comparison("x", measured, impossible, larger_is_better)
    assert not comparison
    assert comparison.would_pass is not None
    assert Comparison("x", measured, comparison.would_pass, larger_is_better)
    assert comparison.would_pass == pytest.approx(measured, rel=0.01)


def test_worst_keeps_a_nan_that_max_would_lose():
    assert worst([1.0, 3.0, 2.0]) == 3
    assert worst([1.0, 3.0], larger_is_better=True) == 1
    assert math.isnan(worst([1.0, math.nan, 2.0]))
    assert math.isnan(worst([]))


def test_psnr_of_known_noise():
    black = np.zeros((4, 4, 3))
    assert psnr_db(black, black + 0.1) == pytest.approx(20)
    assert psnr_db(black, black + 25.5, peak=255) == pytest.approx(20)
    assert psnr_db(black, black) == MAX_PSNR_DB
    assert math.isnan(psnr_db(black, black + np.nan))
    assert math.isnan(psnr_db(black, black + np.inf))


def test_ssim_equals_scikit_image():
    # skimage.metrics.structural_similarity(*images(), channel_axis=2, gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=1.0), scikit-image 0.25
    assert ssim(*images()) == pytest.approx(0.9472866675452631, abs=1e-12)


def test_ssim_of_flat_images_is_the_luminance_term():
    one, other = np.full((11, 11, 1), 0.5), np.full((11, 11, 1), 0.25)
    c1 = 0.01**2
    assert ssim(one, other) == pytest.approx((2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1))


def test_ssim_is_one_for_itself_and_nan_for_nan():
    reference, _ = images()
    assert ssim(reference, reference) == pytest.approx(1)
    assert math.isnan(ssim(reference, np.where(reference > 0.99, np.nan, reference)))


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(InputError, match="at least 11"):
        ssim(np.ones((10, 32, 3)), np.ones((10, 32, 3)))
