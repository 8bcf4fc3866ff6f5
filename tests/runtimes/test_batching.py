"""Rows through sessions, and the checks that the loop repeats at every step."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.backends.batching import RowRunner, all_finite
from runtimes.bundle.tensors import ShapeRange, TensorSpec
from runtimes.errors import InputError, OutOfMemoryError
from tests.runtimes.fakes import FakeSession, axes, component


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17, -1])
def test_one_number_that_is_not_finite_is_found_anywhere(bad, where):
    array = np.zeros((2, 3, 5), np.float32)
    assert all_finite(array)
    array.flat[where] = bad
    assert not all_finite(array)


def test_finite_numbers_whose_sum_overflows_are_finite():
    with np.errstate(over="ignore"):
        assert all_finite(np.full(9, 3e38, np.float32))
    with np.errstate(invalid="ignore"):
        assert not all_finite(np.array([np.inf, -np.inf], np.float32))


def session(least: int = 1, most: int = 4) -> FakeSession:
    spec = TensorSpec("x", "float32", ("batch", 2))
    return FakeSession("net", component((spec,), (TensorSpec("y", "float32", ("batch", 2)),),
                                        {"batch": axes(ShapeRange(least, least, most), ShapeRange(1, 1, 9))["batch"]}),
                       lambda x: x + 1)


@pytest.mark.parametrize(("count", "least", "most"), [(3, 1, 4), (9, 1, 4), (2, 4, 4), (7, 2, 3)])
def test_rows_are_cut_and_padded_without_changing_them(count, least, most):
    net, rows = session(least, most), np.arange(2 * count, dtype=np.float64).reshape(count, 2)
    runner = RowRunner(net, count)
    for _ in range(2):
        np.testing.assert_array_equal(runner.run({"x": rows})["y"], rows + 1)
    assert all(least <= len(call["x"]) <= most for call in net.calls)


def test_a_session_checks_every_signature_and_not_only_the_first():
    net = session()
    net.run({"x": np.zeros((2, 2), np.float32)})
    for wrong in ({"x": np.zeros((2, 2), np.float64)}, {"x": np.zeros((2, 3), np.float32)}, {"x": np.zeros(2)},
                  {"x": np.zeros((5, 2), np.float32)}, {"z": np.zeros((2, 2), np.float32)}, {}):
        for _ in range(2):
            with pytest.raises(InputError):
                net.run(wrong)


class Small(FakeSession):
    """Memory for two rows."""

    def _run(self, feeds):
        if len(feeds["x"]) > 2:
            raise OutOfMemoryError("out of memory", where="net")
        return super()._run(feeds)


def test_where_memory_runs_out_the_calls_become_smaller_and_stay_so():
    plain, rows = session(most=8), np.arange(16, dtype=np.float32).reshape(8, 2)
    net = Small("net", plain.component, plain.function)
    runner = RowRunner(net, 8)
    for _ in range(2):
        np.testing.assert_array_equal(runner.run({"x": rows})["y"], rows + 1)
    assert [len(call["x"]) for call in net.calls] == [2] * 8
    with pytest.raises(OutOfMemoryError):
        RowRunner(Small("net", session(least=3, most=8).component, plain.function), 7).run({"x": rows})
