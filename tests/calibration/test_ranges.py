"""Estimators of ranges against what is known of a distribution, and the bookkeeping over the schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.integers.ranges import ESTIMATORS, STRATA, Observed, Scheme, drift, estimate, stratum_of
from calibration.trajectory.inner_tensors import observe
from runtimes.errors import InputError
from tests.calibration.graphs import calls, write_graph


def seen(values: np.ndarray) -> Observed:
    observed = Observed()
    observed.extend(values, None)
    observed.count(values)
    return observed


def error(values: np.ndarray, bounds: tuple[float, float], scheme: Scheme) -> float:
    rounded = scheme.rounded(values, np.array([bounds[0]]), np.array([bounds[1]]))[0]
    return float(((rounded - values) ** 2).mean())


NORMAL = np.random.default_rng(0).standard_normal(200_000)
OUTLIER = np.concatenate([NORMAL[:50_000], [60.0]])


def test_minmax_is_everything_that_was_seen():
    assert estimate({"t": seen(OUTLIER)}, "minmax", Scheme())["t"] == (OUTLIER.min(), 60.0)


@pytest.mark.parametrize("estimator", ["percentile", "entropy"])
def test_one_outlier_does_not_widen_percentile_and_entropy(estimator):
    low, high = estimate({"t": seen(OUTLIER)}, estimator, Scheme())["t"]
    assert -6 < low < -2
    assert 2 < high < 40


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("values", [NORMAL, OUTLIER, np.abs(NORMAL), NORMAL**3],
                         ids=["normal", "outlier", "half", "cube"])
def test_no_estimator_beats_mse_at_its_own_measure(values, signed):
    scheme, observed = Scheme(signed=signed), seen(values)
    errors = {name: error(values, e(observed, scheme), scheme) for name, e in ESTIMATORS.items()}
    assert errors["mse"] <= 1.02 * min(errors.values())  # it searches a grid and sees a histogram


def test_zero_is_exact_and_a_constant_tensor_has_a_scale():
    for low, high in ((2.0, 5.0), (-3.0, -1.0), (0.0, 0.0)):
        for scheme in (Scheme(), Scheme(signed=True)):
            scale, zero = scheme.scale_and_zero(low, high)
            assert scale > 0
            assert (zero == 0) if scheme.signed else (0 <= zero <= 255)


def test_values_that_are_not_finite_are_refused_by_name():
    with pytest.raises(InputError, match="not finite") as error_:
        estimate({"bad": seen(np.array([1.0, np.nan]))}, "minmax", Scheme())
    assert error_.value.where == "bad"


def test_an_unknown_estimator_is_refused():
    with pytest.raises(InputError, match="unknown range estimator"):
        estimate({}, "median", Scheme())


def test_ranges_are_recorded_for_each_part_of_the_schedule(tmp_path: Path):
    graph = write_graph(tmp_path / "model.onnx")
    found = drift(observe(graph, ["sample", "d"], lambda: ({**c, "timestep": c["timestep"] * 1000} for c in calls(10)),
                          timestep="timestep", histograms=False))
    assert [row[0] for row in found["sample"]] == list(range(STRATA))
    assert found["sample"][-1][2] > 1.5 * found["sample"][0][2]  # the inputs' spread grows with the timestep


def test_strata_cover_the_schedule():
    assert [stratum_of(t) for t in (0, 99.9, 100, 999, 1000)] == [0, 0, 1, 9, 9]
