"""Optimization profiles of engines: which shapes they span, and which are refused before any builder is asked."""

from __future__ import annotations

import pytest

from exporters.tensorrt.optimization_profiles import make_profiles
from runtimes.bundle.tensors import Axis, ShapeRange, TensorSpec
from runtimes.errors import InputError

INPUTS = (TensorSpec("sample", "float32", ("batch", 4, "height", "height")),
          TensorSpec("timestep", "float32", ("batch",)))
AXES = {"batch": Axis("images", ShapeRange(1, 2, 8)), "height": Axis("rows", ShapeRange(8, 16, 32), 4)}


def test_one_profile_spans_the_components_ranges():
    assert make_profiles(INPUTS, AXES) == ({
        "sample": ((1, 4, 8, 8), (2, 4, 16, 16), (8, 4, 32, 32)), "timestep": ((1,), (2,), (8,))},)


def test_several_profiles_keep_the_ranges_they_do_not_mention_and_equal_ones_are_one():
    wanted = [{"batch": ShapeRange(1, 1, 1)}, {"batch": ShapeRange(4, 4, 8)}, {"batch": ShapeRange(1, 1, 1)}]
    made = make_profiles(INPUTS, AXES, wanted)
    assert [p["timestep"] for p in made] == [((1,), (1,), (1,)), ((4,), (4,), (8,))]
    assert made[0]["sample"][2] == (1, 4, 32, 32)


def test_static_shapes_are_the_most_common_ones():
    assert make_profiles(INPUTS, AXES, static=True)[0]["sample"] == ((2, 4, 16, 16),) * 3


def test_min_above_opt_is_refused():
    with pytest.raises(InputError, match="1 <= min <= opt <= max, got 4:2:8"):
        make_profiles(INPUTS, AXES, [{"batch": ShapeRange(4, 2, 8)}])


@pytest.mark.parametrize(("axis", "sizes", "message"), [
    ("batch", ShapeRange(1, 2, 16), r"batch=1:2:16 is outside the model's limits 1 to 8"),
    ("height", ShapeRange(4, 8, 8), r"height=4:8:8 is outside the model's limits 8 to 32, multiples of 4"),
    ("height", ShapeRange(8, 10, 16), r"multiples of 4"),
    ("depth", ShapeRange(1, 1, 1), r"no axis depth.*axes: batch, height"),
])
def test_a_profile_outside_the_models_limits_is_refused(axis, sizes, message):
    with pytest.raises(InputError, match=message):
        make_profiles(INPUTS, AXES, [{axis: sizes}], where="unet")
